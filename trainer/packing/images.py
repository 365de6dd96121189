"""Images of a batch's prompts: pixel values, each image once, and positions along three axes.

The model's tower sees the images of a tree once, whatever the layout. Where several sequences of a
batch have a copy of their prompt, ``image_index`` says which image each copy shows, and
`model.images` gives all copies the same features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.images.processor import IMAGES, PIXELS
from ..errors import UserError

if TYPE_CHECKING:
    from ..data.images.processor import ImageProcessor
    from .layout import Forest

IMAGE_INPUTS = (*PIXELS, "image_index", "token_type_ids")
"""The model's inputs that `add_images` adds to a batch."""


def add_images(
    processor: ImageProcessor | None,
    batch: dict[str, Any],
    forest: Forest,
    rows: Sequence[Mapping[str, Any]],
    shared: bool,
) -> None:
    """Add the images of ``rows`` to their ``batch``, which `PairCollator` has laid out.

    ======================  ===========  =========================================================
    ``pixel_values``        [...]        of the images of every tree, once, as the processor of
    ``image_grid_thw``      [images, 3]  the family makes them; patches of each (three axes)
    ``image_index``         list         of every image in the rows, from left to right and from
                                         row to row, its place among those; on the host
    ``position_ids``        [4, B, T]    where the family has three axes: in the token's sequence,
                                         then along time, height and width
    ``token_type_ids``      [B, T]       where tokens of an image see later ones: 1 for those
    ======================  ===========  =========================================================

    Args:
        processor: the collator's ``images``.
        batch: with segments that are trees (``shared``) or sequences of ``forest``.
    """
    if processor is None:
        raise UserError(
            "data_collator: set its images to an ImageProcessor; the rows have images, and it has "
            "no processor that makes pixel values of them"
        )
    ids, segments = batch["input_ids"], batch.get("segment_ids")
    if segments is None:
        segments = np.where(batch["attention_mask"] > 0, np.arange(len(ids))[:, None], -1)
    trees = np.arange(len(forest.prompts)) if shared else forest.tree
    is_image = np.isin(ids, processor.token_ids) & (segments >= 0)
    shown = [int(trees[s]) for s in dict.fromkeys(segments[is_image].tolist())]
    first_rows = [forest.leaves[i][0] for i in np.flatnonzero(forest.branch == 1)]
    images = {tree: rows[first_rows[tree]][IMAGES] for tree in dict.fromkeys(shown)}
    starts = accumulate(map(len, images.values()), initial=0)
    begins = dict(zip(images, starts, strict=False))
    grids: dict[int, Any] = {}
    if images:
        pixels = processor.pixels([image for each in images.values() for image in each])
        batch |= pixels
        batch["image_index"] = [begins[t] + i for t in shown for i in range(len(images[t]))]
        if processor.family.three_axes:
            every = pixels["image_grid_thw"].numpy()
            grids = {t: every[start : start + len(images[t])] for t, start in begins.items()}
    if processor.family.sees_ahead:
        batch["token_type_ids"] = is_image.astype(np.int64)
    if processor.family.three_axes:
        tables = [
            prompt_positions(
                np.asarray(prompt), grids.get(tree, ()), processor.token_ids, processor.merged
            )
            for tree, prompt in enumerate(forest.prompts)
        ]
        owners = np.where(segments >= 0, trees[segments], -1)
        in_sequence = batch.get("position_ids", np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
        batch["position_ids"] = _along_axes(in_sequence, owners, tables)


def _along_axes(
    in_sequence: np.ndarray, owners: np.ndarray, tables: Sequence[tuple[np.ndarray, int]]
) -> np.ndarray:
    """[4, B, T] of tokens of the trees ``owners`` [B, T], each with a table for its prompt."""
    positions = np.zeros((4, *owners.shape), np.int64)
    positions[0] = in_sequence
    for tree, (table, following) in enumerate(tables):
        places, length = in_sequence[owners == tree], table.shape[1]
        inside = table[:, np.minimum(places, length - 1)]
        after = places - length + following
        positions[1:, owners == tree] = np.where(places < length, inside, after)
    return positions


def prompt_positions(
    ids: np.ndarray, grids: Sequence[Any], image_tokens: Sequence[int], merged: int
) -> tuple[np.ndarray, int]:
    """Positions [3, tokens] of a prompt along time, height and width, and the one after it.

    Text counts all three on together. An image's tokens have those of a grid that begins where the
    text before it ends; the text after it goes on behind its longer side.

    Args:
        ids: [tokens] of the prompt.
        grids: of each image: patches in time, height and width.
        image_tokens: at whose places the images are.
        merged: patches along a side that are one token.
    """
    positions = np.empty((3, len(ids)), np.int64)
    is_image = np.isin(ids, image_tokens)
    place = following = 0
    for times, *sides in grids:
        begin = place + int(is_image[place:].argmax())
        positions[:, place:begin] = following + np.arange(begin - place)
        following += begin - place
        grid = np.indices((int(times), *(int(side) // merged for side in sides))).reshape(3, -1)
        place = begin + grid.shape[1]
        positions[:, begin:place] = following + grid
        following += max(map(int, sides)) // merged
    positions[:, place:] = following + np.arange(len(ids) - place)
    return positions, following + len(ids) - place
