"""The model's own processor: how many tokens each image becomes, and its pixel values.

The text of a prompt has one mark for each image. Before it is tokenized, the processor's own
tokens for that image take the mark's place, so that lengths count them. Pixel values are made when
a batch is (`packing.images`): the table keeps the images as they were encoded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError, refusals
from ..formats.messages import RowProblem
from ..formats.shapes import IMAGE_COLUMNS
from .columns import NOT_ONE_EACH, UNREADABLE, decoded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from ...settings.data import DataSettings

IMAGES, IMAGE_KEY = "images", "image_key"
"""Columns of the table: a prompt's encoded images, and two numbers of their content."""

PIXELS = ("pixel_values", "image_grid_thw")
"""What a processor makes of images, one image after the other."""


@dataclass(frozen=True)
class Family:
    """What a model does with images.

    Args:
        model: its type, as configs name it.
        three_axes: positions are of time, height and width.
        sees_ahead: tokens of an image see the later ones of it, so that only padded rows do.
    """

    model: str
    three_axes: bool = False
    sees_ahead: bool = False


FAMILIES = {
    "LlavaProcessor": Family("llava"),
    "Qwen2VLProcessor": Family("qwen2_vl", three_axes=True),
    "Qwen2_5_VLProcessor": Family("qwen2_5_vl", three_axes=True),
    "Qwen3VLProcessor": Family("qwen3_vl", three_axes=True),
    "Gemma3Processor": Family("gemma3", sees_ahead=True),
}
"""By the class of their processor, the families whose images train here."""


class ImageProcessor:
    """A processor of one of `FAMILIES`, for one row's images or for a batch's."""

    def __init__(self, processor: Any) -> None:
        family = FAMILIES.get(type(processor).__name__)
        if family is None or not getattr(processor, "image_token", None):
            known = ", ".join(each.model for each in FAMILIES.values())
            raise UserError(
                f"images: take a model of the kind {known}, or leave out rows with images; "
                f"{type(processor).__name__} is the processor of none of these"
            )
        self.processor, self.family = processor, family
        self._last: tuple[list[bytes], list[str]] = ([], [])

    @property
    def token_ids(self) -> list[int]:
        """The tokens at whose places the model puts what its tower sees."""
        return self.processor.image_token_ids

    @property
    def merged(self) -> int:
        """Patches along each side that become one token, where positions have three axes."""
        return self.processor.image_processor.merge_size

    @property
    def content(self) -> str:
        """All that decides the tokens of an image."""
        facts = {n: v for n, v in vars(self.processor).items() if isinstance(v, int | str | None)}
        facts |= {"class": type(self.processor).__name__, "chat_template": ""}
        return json.dumps([facts, self.processor.image_processor.to_dict()], default=str)

    def expanded(self, texts: Any, images: list[bytes]) -> Any:
        """A pair's ``texts`` with the tokens of each image in the place of its mark."""
        mark = self.processor.image_token
        pieces = [text.split(mark) for text in texts]
        if any(len(each) != len(images) + 1 for each in pieces):
            raise RowProblem(
                NOT_ONE_EACH,
                f"{len(images)} images, and the chat template writes {mark} "
                f"{len(pieces[0]) - 1} times, with answers {len(pieces[1]) - 1} and "
                f"{len(pieces[2]) - 1} times",
            )
        if not images:
            return texts
        last = texts[0].rfind(mark) + len(mark)
        if any(text[:last] != texts[0][:last] for text in texts):
            raise RowProblem(NOT_ONE_EACH, "the chat template writes them otherwise with answers")
        tokens = self._tokens(images)
        return tuple(
            "".join([each[0], *(t + piece for t, piece in zip(tokens, each[1:], strict=True))])
            for each in pieces
        )

    def pixels(self, images: Sequence[bytes]) -> dict[str, Any]:
        """The model's inputs for images, those of `PIXELS` that it has."""
        made = self._processed(images)
        if not self.family.three_axes and len(made["pixel_values"]) != len(images):
            raise UserError(
                "images: set do_pan_and_scan: false in the model's preprocessor_config.json; the "
                f"processor made {len(made['pixel_values'])} images of {len(images)}"
            )
        return {name: made[name] for name in PIXELS if name in made}

    def _tokens(self, images: list[bytes]) -> list[str]:
        """Text for each image; pairs of one row follow each other and have the same."""
        if self._last[0] != images:
            made = self._processed(images)["text_replacement_offsets"][0]
            self._last = images, [each["replacement"] for each in made]
        return self._last[1]

    def _processed(self, images: Sequence[bytes]) -> Any:
        pictures = [decoded(image) for image in images]
        try:
            made = self.processor(
                images=[pictures],
                text=[self.processor.image_token * len(pictures)],
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except ValueError as error:  # such as an image that is a line
            raise RowProblem(UNREADABLE, f"{type(error).__name__}: {error}") from error
        if "text_replacement_offsets" not in made:
            raise UserError(
                "images: pip install -U transformers (5.23 or later); this one's processors do not "
                "say which tokens an image becomes"
            )
        unknown = set(self.processor.image_processor.model_input_names) & set(made) - set(PIXELS)
        if unknown:
            raise UserError(
                f"images: take another checkpoint; {type(self.processor).__name__} makes "
                f"{', '.join(sorted(unknown))} here, which no batch carries"
            )
        return made


def image_processor(tokenizer: Any, settings: DataSettings) -> ImageProcessor:
    """The processor that the tokenizer came in, or the one beside the model or tokenizer.

    Raises:
        UserError: there is none, or it is none of `FAMILIES`.
    """
    from transformers import AutoProcessor

    for setting, usual in (("chat_rendering", "joint"), ("score", "completion")):
        if getattr(settings, setting) != usual:
            raise UserError(
                f"{setting}: set it to {usual}, or leave out rows with images, which have no other "
                f"yet; got {getattr(settings, setting)}"
            )
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
        name = getattr(settings, "model_name_or_path", None) or tokenizer.name_or_path
        if not name:
            raise UserError(
                "images: give the model's own processor as processing_class; the rows have images, "
                "and neither the model nor the tokenizer has a name to find it by"
            )
        revision = getattr(settings, "model_revision", "main")
        with refusals(f"images: the processor of {name} cannot be loaded", Exception):
            try:
                processor = AutoProcessor.from_pretrained(name, revision=revision)
            except ImportError as error:
                raise UserError(
                    f"images: pip install 'widemargin[images]'; the processor of {name} needs more "
                    f"than is there: {' '.join(str(error).split())[:200]}"
                ) from error
    return ImageProcessor(processor)


def processor_of(
    tables: Sequence[Dataset], tokenizer: Any, settings: DataSettings
) -> ImageProcessor | None:
    """The processor of the images in checked columns; None where no table has any."""
    columns = {column for table in tables for column in table.column_names}
    return image_processor(tokenizer, settings) if columns & {*IMAGE_COLUMNS} else None


def image_key(images: Sequence[bytes]) -> list[int]:
    """Two numbers that tell these images from others; none for no images."""
    if not images:
        return []
    content = hashlib.blake2b(digest_size=16)
    for image in images:
        content.update(hashlib.blake2b(image, digest_size=16).digest())
    return np.frombuffer(content.digest(), np.int64).tolist()
