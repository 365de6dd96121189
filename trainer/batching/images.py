"""What a run with images needs before its batches: a processor, and settings that suit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.images.columns import checked_media
from ..data.images.processor import IMAGE_KEY, ImageProcessor, image_processor
from ..errors import UserError
from ..packing.choose import Packing, packing_of_images
from ..packing.split import refuse_split
from ..settings.checks import is_split

if TYPE_CHECKING:
    from ..data.table import PairRows
    from ..objectives import Objective
    from ..settings.config import PreferenceConfig


def refuse_raw_images(name: str, dataset: Any) -> None:
    """Raise ``UserError`` for tokens of the user's own beside images, which nobody would read."""
    if IMAGE_KEY not in dataset.column_names:
        checked_media(name, dataset, readable=False)


def run_processor(
    tokenizer: Any, settings: PreferenceConfig, objective: Objective
) -> ImageProcessor:
    """The processor of a run's images; ``UserError`` where the settings take none."""
    refuse_split(settings, "rows with images")
    if objective.scores_prompts:
        raise UserError(
            "nll: take one of answers alone, or leave out rows with images; this one scores "
            "prompts too, and nothing predicts an image's tokens"
        )
    if settings.eval_samples:
        raise UserError(
            "eval_samples: set it to 0, or leave out rows with images; answers are written to "
            "prompts of text alone"
        )
    return image_processor(tokenizer, settings)


def run_packing(
    images: ImageProcessor | None, model: Any, rows: PairRows | None, settings: PreferenceConfig
) -> Packing | None:
    """The packing of a run with images where there is no choice; see `packing_of_images`.

    DDP is told to look for parameters of towers that a step does not reach.
    """
    if any(hasattr(model.config, name) for name in ("vision_config", "audio_config")):
        # A rank's rows may show nothing, and some towers have layers that nothing reads.
        settings.settle("ddp_find_unused_parameters", True)
    if images is None:
        return None
    some = rows is not None and not (rows.has_images and rows.list_lengths(IMAGE_KEY).all())
    if some and is_split(settings):
        raise UserError(
            "images: leave out the rows without images, or train without ZeRO-3 and FSDP; a "
            "rank that sees no image would not wait for the others' towers"
        )
    return packing_of_images(images.family, model.config, settings.packing)
