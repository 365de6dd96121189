"""A folder that holds one model: written completely, nothing of an earlier model stays."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, refusals
from ..files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WRITING = "tmp-model"
MERGED = "merged"
GENERATION = "generation_config.json"
WEIGHTS = (
    "config.json",
    GENERATION,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
MODEL_FILES = (*WEIGHTS, *ADAPTER, *PROCESSOR, *TOKENIZER)
"""What transformers and peft write of a model, and look for when they load a folder."""

logger = logging.getLogger(__name__)


@contextmanager
def writing_model(folder: Path, *, keep_merged: bool = False) -> Iterator[Path]:
    """A new folder for the caller to write a model to; it then takes the place of ``folder``'s.

    Model files in ``folder`` that the new model does not have are removed, and said; other files
    stay. ``folder``'s model stays as it was if writing fails.

    Args:
        keep_merged: leave the folder of a merged model in ``folder`` as it is.
    """
    staging = folder / WRITING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        readable_as_others(staging)
        names = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
        stale = _remove_model(folder, {folder / name for name in names})
        if not keep_merged and _remove_model(folder / MERGED, set()):
            stale.append(f"{MERGED}/")
        for name in sorted(names):
            (folder / name).parent.mkdir(exist_ok=True)
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if stale:
        logger.warning("Removed from %s, of an earlier model: %s", folder, ", ".join(stale))


def check_base_stays(base: str | None, folder: Path, setting: str) -> None:
    """Raise ``UserError`` where a model in ``folder`` would replace the one that an adapter is for.

    Args:
        base: the folder or hub name of the adapter's model.
        setting: names ``folder``.
    """
    source, out = Path(base or "").expanduser().resolve(), folder.expanduser().resolve()
    within = source.parent == out and source.name.startswith((MERGED, "checkpoint-"))
    if base and source.is_dir() and (source == out or within):
        raise UserError(
            f"{setting}: name another folder than {folder}, which would replace {base}, the model "
            "that the adapter needs"
        )


def is_model(folder: Path) -> bool:
    """Whether ``folder`` holds a model, and no adapter with its model's config beside it."""
    config, _, *patterns = WEIGHTS
    weights = [path for pattern in patterns for path in folder.glob(pattern)]
    is_adapter = not weights and (folder / ADAPTER[0]).is_file()
    return (folder / config).is_file() and not is_adapter


def model_files(folder: Path) -> list[Path]:
    """The files of a model in ``folder``, by their names."""
    return sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))


def code_files(folder: Path) -> list[Path]:
    """The Python files that a model or tokenizer in ``folder`` is made of, if its code came along.

    Those that its config names and those that they import, and no other script in the folder.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[Path] = set()
    for config in (folder / name for name in ("config.json", "tokenizer_config.json")):
        named = read_json(config).get("auto_map", {}) if config.is_file() else {}
        listed = [each for value in named.values() for each in _listed(value)]
        for module in {each.rpartition(".")[0] for each in listed if each and "--" not in each}:
            path = folder / f"{module}.py"
            if path.is_file():
                found |= {path, *map(Path, get_relative_import_files(path))}
    return sorted(found)


def readable_as_others(folder: Path) -> None:
    """Give weights the mode of an ordinary new file; safetensors leaves them to their owner."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def copy_processor(config: PreTrainedConfig, source: str, revision: str, folder: Path) -> None:
    """Copy the processor of a model with a vision or audio tower, which training leaves alone.

    Args:
        source: the folder or hub name that the model came from.
    """
    from transformers.utils.hub import cached_file

    if not any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        return
    lenient = ("gated_repo", "missing_entries", "connection_errors")
    options: Any = {f"_raise_exceptions_for_{kind}": False for kind in lenient}
    copied = False
    with refusals(f"model {source}: its processor cannot be copied to {folder}", OSError):
        for name in PROCESSOR if source else ():  # a model made in memory has no name
            found = cached_file(source, name, revision=revision, **options)
            if found is not None:
                shutil.copyfile(found, folder / name)
                copied = True
    if not copied:
        logger.warning(
            "Copy the processor's files (%s) to %s before serving it with images or audio: %s has "
            "none here",
            *(", ".join(PROCESSOR), folder, source or "the model"),
        )


@contextmanager
def with_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Inside, ``model`` may be saved to ``folder``; its generation config is written as it is.

    transformers refuses to save one with a temperature and no sampling, as many published models
    have, once a token in it is set to the tokenizer's.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    if (folder / GENERATION).is_file():
        own.to_json_file(folder / GENERATION)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _remove_model(folder: Path, kept: set[Path]) -> list[str]:
    """Remove a model's files, and the folder if that empties it; the names of those not kept."""
    stale = [path for path in model_files(folder) if path not in kept]
    for path in stale:
        path.unlink()
    if stale and not any(folder.iterdir()):
        folder.rmdir()
    return [path.relative_to(folder).as_posix() for path in stale]
