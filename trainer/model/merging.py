"""A trained adapter merged into its model: one that plain transformers loads, without peft."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, refusals
from ..settings.checks import is_split
from ..settings.model import AdapterSettings, ModelSettings
from .adapters import bare_model, put_adapter
from .folder import (
    MERGED,
    check_base_stays,
    copy_processor,
    with_generation_config,
    writing_model,
)
from .loading import adapted_model, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

logger = logging.getLogger(__name__)


def check_merges_in_memory(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Raise ``UserError`` where an adapter cannot be merged into the model that trains."""
    if is_split(args) or getattr(model, "is_quantized", False):
        raise UserError(
            "merge_adapter: a model that is quantized or split over ranks is merged from its "
            "files; name them in model_name_or_path"
        )


def export_merged(
    settings: ModelSettings,
    adapter: Path,
    out: Path,
    trained: Any,
    *,
    from_files: bool = True,
) -> None:
    """Write the model that ``settings`` name with the saved ``adapter`` merged in, to ``out``.

    It starts from the model's files and merges on the CPU, so that it works the same under every
    engine. After QLoRA the adapter is merged into the weights before their quantization, in
    ``dtype``, although it learnt with the quantized ones and fits them a little better.

    Args:
        trained: the model that trained. A copy of it is merged where it came as an object without
            files (``from_files``), or with other weights than the files have.

    Raises:
        UserError: files that cannot be read or written, or a merge that is not finite.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 loading is for all ranks at once; this is one's
    values = {field.name: getattr(settings, field.name) for field in fields(ModelSettings)}
    values |= {field.name: field.default for field in fields(AdapterSettings)}
    plain = ModelSettings(**values)
    if settings.load_in_4bit or settings.load_in_8bit:
        logger.info("merging into the weights as they were before quantization")
    base: Any = load_model(plain) if from_files else None
    if hasattr(base, "get_base_model"):  # it went on with an adapter, and ``adapter`` has it all
        base = base.unload()
    if base is not None and _differs(trained, base):
        logger.warning(
            "Merging the model that trained: %s has other weights", settings.model_name_or_path
        )
        base = None
    _write_merged(plain, adapter, out, base, trained)


def _write_merged(
    settings: ModelSettings, adapter: Path, out: Path, base: Any, copied: Any
) -> None:
    """Merge ``adapter`` into ``base``; without one, a copy of the model that has it already."""
    with refusals(f"adapter {adapter}: cannot be merged", OSError, ValueError, RuntimeError):
        if base is None:
            adapted: Any = copy.deepcopy(copied)
        else:
            adapted = put_adapter(base, str(adapter), "main")
        merged = adapted.merge_and_unload(safe_merge=True)
        tokenizer = load_tokenizer(settings, str(adapter))
        _write(merged, tokenizer, settings.model_revision, out)


def merge_folder(folder: Path, out: Path | None, dtype: str, trust_remote_code: bool) -> Path:
    """Merge the adapter in ``folder`` into its base and write the model; where it was written.

    Args:
        out: None for ``merged`` in ``folder``.
        dtype: of the weights; "auto" for the base's own.

    Raises:
        UserError: no adapter there, files that cannot be read or written, a merge that is not
            finite, or one in place of the base.
    """
    out = folder / MERGED if out is None else out
    settings = ModelSettings(
        model_name_or_path=str(folder), dtype=dtype, trust_remote_code=trust_remote_code
    )
    base = adapted_model(settings, str(folder))
    if base is None and not folder.expanduser().is_dir():
        raise UserError(f"{folder}: no such folder; name a run's folder or a checkpoint")
    if base is None:
        raise UserError(
            f"{folder}: expected an adapter's folder, with adapter_config.json and no full model; "
            "a full model's folder has nothing to merge"
        )
    check_base_stays(base.model_name_or_path, out, "--out")
    adapted: Any = load_model(settings)
    tokenizer = load_tokenizer(settings)
    with refusals(f"adapter {folder}: cannot be merged", OSError, ValueError, RuntimeError):
        merged = adapted.merge_and_unload(safe_merge=True)
        _write(merged, tokenizer, base.model_revision, out)
    return out


def _write(merged: Any, tokenizer: Any, revision: str, out: Path) -> None:
    with writing_model(out) as written:
        with with_generation_config(merged, written):
            merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
        copy_processor(merged.config, merged.name_or_path, revision, written)


def _differs(trained: Any, base: Any) -> bool:
    """Whether frozen weights of the model that trained are not the files', where both are whole."""
    from torch import equal

    weights = dict(base.named_parameters())
    for name, weight in bare_model(trained).named_parameters():
        read = weights.get(name.replace(".base_layer", ""))
        if weight.requires_grad or read is None or read.shape != weight.shape:
            continue  # an adapter's, or quantized or split over ranks (ZeRO-3)
        if hasattr(weight, "full_tensor"):
            continue  # split over ranks (FSDP2), where a comparison would be for all of them
        if weight.is_floating_point() and not equal(weight.detach().cpu().to(read.dtype), read):
            return True
    return False
