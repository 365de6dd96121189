"""Columns of images, whose bytes lie in the rows themselves, and the messages that show them.

A row that names a file or a host instead is refused: whoever publishes data must not choose what
this machine opens. `datasets` would open it as soon as such a row is read, so its columns are read
as they are stored.
"""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import UserError
from ..formats.messages import IMAGE_PART, MISSING, NOT_TEXT, Messages, RowProblem, kind
from ..formats.shapes import IMAGE_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from ..rows import Pair

MEDIA = (*IMAGE_COLUMNS, "video", "videos", "audio", "audios", "pixel_values")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded; other formats have readers that start programs, such as PostScript's."""

MARK = "<image>"
"""Where LLaVA's, LLaMA-Factory's and ms-swift's text shows an image."""

NOT_ONE_EACH = "images and their places in the prompt differ in number"
IMAGES_BEFORE_TURNS = "images before an answer of several turns"
UNREADABLE = "an image that cannot be read"


def checked_media(name: str, dataset: Any, readable: bool) -> tuple[Dataset, list[str]]:
    """``dataset``, whose images are read as they are stored, and its columns that have some.

    Args:
        name: what messages call the data set.
        dataset: with renamed columns.
        readable: whether a row's images belong to one pair.

    Raises:
        UserError: other media, or images that do not lie in the rows.
    """
    found = []
    for column in dataset.column_names:
        if column.casefold() not in MEDIA:
            continue
        stored: Any = dataset.data.column(column)
        sizes = _sizes(stored) if _is_list(stored.type) else stored.is_valid()
        # A filter's choice of rows lies beside the table.
        rows = None if dataset._indices is None else dataset._indices.column(0)
        if not _any(sizes if rows is None else sizes.take(rows)):
            continue
        if column not in IMAGE_COLUMNS or not readable:
            raise UserError(
                f"data set {name!r} has {column}: text and images in prompts train here, and "
                f"without its {column} a pair means something else; leave out such rows, or the "
                "column if the texts stand by themselves"
            )
        if not (_is_embedded(stored) or (rows is not None and _is_embedded(stored.take(rows)))):
            raise UserError(
                f"data set {name!r}: put the images themselves into its column {column}, as bytes "
                "or PIL images (docs/data-formats.md says how); rows that name files or addresses "
                "would choose what this machine opens"
            )
        dataset = _as_stored(dataset, column)
        found.append(column)
    return dataset, found


def images_of(row: dict[str, Any]) -> list[bytes]:
    """The encoded images of a row."""
    values = [row.get(column) for column in IMAGE_COLUMNS]
    listed = next((value for value in values if value), [])
    cells = listed if isinstance(listed, list) else [listed]
    images: list[Any] = [it.get("bytes") if isinstance(it, dict) else it for it in cells]
    for image in images:
        if not isinstance(image, bytes):
            raise RowProblem(MISSING, f"an image is {kind(image)}, not bytes")
    return images


def show_images(pair: Pair, row: dict[str, Any]) -> None:
    """Give ``pair`` the images of its ``row``, and its prompt a part of type "image" for each."""
    images = images_of(row)
    if images and not pair.conversation:
        raise RowProblem(NOT_ONE_EACH, "the prompt is plain text; write it as messages")
    if images and pair.several_turns:
        raise RowProblem(IMAGES_BEFORE_TURNS, "the user says more after the first answer")
    if pair.conversation:
        pair.prompt = with_images(pair.prompt, [*pair.chosen, *pair.rejected], images)
        pair.images = images


def with_images(prompt: Messages, answers: Messages, images: list[bytes]) -> Messages:
    """``prompt`` with a part for each image: its own, at `MARK`s, or before the first question."""
    if _shown(answers):
        raise RowProblem(NOT_TEXT, "an answer has a part of type 'image'")
    if images and not _shown(prompt):
        prompt = [_at_marks(m) if m["role"] == "user" else m for m in prompt]
        prompt = prompt if _shown(prompt) else _before_text(prompt, images)
    shown = _shown(prompt)
    if shown != len(images):
        if not images:
            raise RowProblem(NOT_TEXT, "prompt has a part of type 'image', and its row no image")
        raise RowProblem(
            NOT_ONE_EACH, f"{len(images)} images, {shown} parts of type 'image' or marks {MARK}"
        )
    return prompt


def _at_marks(message: dict[str, Any]) -> dict[str, Any]:
    """``message`` with a part for each `MARK` of its text."""
    parts = _parts(message["content"])
    if not any(MARK in part.get("text", "") for part in parts):
        return message
    placed: list[dict[str, Any]] = []
    for part in parts:
        for i, text in enumerate(part.get("text", "").split(MARK)):
            placed += [dict(IMAGE_PART)] if i else []
            placed += [{**part, "text": text}] if text else []
    return {**message, "content": placed}


def _before_text(prompt: Messages, images: list[bytes]) -> Messages:
    """``prompt`` with the images before the text of its first user message."""
    asked = next((i for i, m in enumerate(prompt) if m["role"] == "user"), None)
    if asked is None:
        raise RowProblem(NOT_ONE_EACH, "no user message to show them in")
    content = [dict(IMAGE_PART) for _ in images] + _parts(prompt[asked]["content"])
    return [*prompt[:asked], {**prompt[asked], "content": content}, *prompt[asked + 1 :]]


def _parts(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def decoded(image: bytes) -> Image:
    """An image in RGB, upright, as `datasets` and transformers decode it."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(
            "images: pip install 'widemargin[images]'; Pillow, which reads images, is not there"
        ) from error
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowProblem(UNREADABLE, f"{type(error).__name__}: {error}") from error


def _shown(messages: Messages) -> int:
    parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return sum(part["type"] == IMAGE_PART["type"] for content in parts for part in content)


def _as_stored(dataset: Any, column: str) -> Any:
    """What `cast_column` does for a column of single images, and not for one of lists."""
    dataset = copy.deepcopy(dataset)
    dataset._info.features[column] = undecoded(dataset.features[column])
    return dataset


def undecoded(feature: Any) -> Any:
    """``feature`` with its images and sounds as they are stored, at every depth."""
    if isinstance(feature, dict):
        return {name: undecoded(each) for name, each in feature.items()}
    if isinstance(feature, list):
        return [undecoded(each) for each in feature]
    if hasattr(feature, "feature"):
        return replace(feature, feature=undecoded(feature.feature))
    media = hasattr(feature, "decode") and type(feature).__name__ != "Json"  # rows of mixed types
    return replace(feature, decode=False) if media else feature


def _is_embedded(stored: Any) -> bool:
    """Whether every value of a column, or of its lists, is an image's bytes or nothing."""
    while _is_list(stored.type):
        stored = pc.call_function("list_flatten", [stored])
    if pa.types.is_struct(stored.type) and stored.type.get_field_index("bytes") >= 0:
        there = stored.is_valid()
        stored = pc.struct_field(stored, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
        if _any(pc.call_function("and", [there, stored.is_null()])):
            return False
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    return any(is_kind(stored.type) for is_kind in kinds)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _sizes(lists: Any) -> Any:
    return pc.call_function("list_value_length", [lists])


def _any(values: Any) -> bool:
    return bool(pc.call_function("any", [values.cast("bool")]).as_py())
