"""Loading the model and tokenizer that a config names, with errors that say what is wrong."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.template import own_tokenizer
from ..errors import UserError, refusals
from ..files import read_json
from ..settings.model import ModelSettings
from .adapters import bare_model, put_adapter, quantization_config, refuse_both
from .folder import is_model
from .head import Scoring, patch_head
from .tensor_parallel import refuse_sharded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


def load_tokenizer(settings: ModelSettings, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (end-of-sequence where it has none).

    ``name`` is a folder or hub name in place of the settings'.
    """
    from transformers import AutoTokenizer

    name = name or settings.tokenizer_name_or_path or _model_name(settings)
    if not Path(name, "tokenizer_config.json").is_file():
        base = adapted_model(settings, name)
        if base is not None:
            return load_tokenizer(base, base.model_name_or_path)
    tokenizer = own_tokenizer(_load(AutoTokenizer, name, settings, "tokenizer"))
    if settings.tokenizer_as_saved:
        saved = _as_saved(settings, name)
        tokenizer = saved if changes_tokens(tokenizer, saved) else tokenizer
    return with_padding(tokenizer, name)


def with_padding(tokenizer: Any, name: str) -> Any:
    """The tokenizer, with its end token to pad with where it has none; padding is masked."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {name}: it has neither a padding nor an end token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _as_saved(settings: ModelSettings, name: str) -> Any:
    """The tokenizer of tokenizer.json as it is; None where there is no such file."""
    from transformers import PreTrainedTokenizerFast

    try:
        return _load(PreTrainedTokenizerFast, name, settings, "tokenizer")
    except UserError as error:
        logger.warning(
            "tokenizer_as_saved: the tokenizer stays as transformers builds it, since its file "
            "could not be read as it is: %s",
            error,
        )
        return None


def changes_tokens(tokenizer: Any, saved: Any) -> bool:
    """Whether ``saved`` makes other tokens of text after special ones than ``tokenizer``."""
    if saved is None:
        return False
    marks = ["", *(token.content for token in tokenizer.added_tokens_decoder.values())]
    texts = [f"{mark}{text}" for mark in marks[:64] for text in ("[a b", " a")]
    one, other = (each(texts, add_special_tokens=False)["input_ids"] for each in (tokenizer, saved))
    return one != other


def load_model(
    settings: ModelSettings, name: str | None = None, quantization: Any = None
) -> PreTrainedModel:
    """The causal language model with its weights, safetensors only.

    ``name`` is a folder or hub name in place of the settings'. Quantized if they say so, or as the
    config ``quantization`` does. One that holds an adapter gives peft's model of it, on its base,
    ready to learn on.
    """
    from transformers import AutoConfig

    name = name or _model_name(settings)
    base = adapted_model(settings, name)
    if base is not None:
        model = load_model(base, quantization=quantization)
        where = str(Path(name).expanduser()) if _looks_local(name) else name
        with refusals(f"adapter {name}: cannot be loaded", Exception):
            return put_adapter(model, where, _revision(settings, name), learns=True)
    config = _load(AutoConfig, name, settings, "model")
    _check_size(config, name)
    computes = "bfloat16" if getattr(settings, "bf16", False) else settings.dtype
    quantization = quantization or quantization_config(
        settings, "float32" if computes == "auto" else computes
    )
    model, found = _load(
        _kind_of_model(config, name),
        name,
        settings,
        "model",
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        use_safetensors=True,
        output_loading_info=True,
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    refuse_both(model, name)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"model {name}: give a complete model; its files lack "
            f"{len(missing)} of the weights that config.json describes, such as {missing[0]}"
        )
    unused = sorted(found["unexpected_keys"])
    if unused:
        logger.warning(
            "model %s: %s does not use %d of the weights in its files, such as %s, and saves none "
            "of them",
            name, type(model).__name__, len(unused), unused[0],
        )  # fmt: skip
    return model


def _kind_of_model(config: PreTrainedConfig, name: str) -> Any:
    """transformers' class that loads it: for causal models, or for those of images and text."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    coded = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if coded or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"model {name}: take a causal language model; transformers has no causal head for "
        f"{config.model_type}"
    )


def _check_size(config: PreTrainedConfig, name: str) -> None:
    """Raise ``UserError`` for a folder whose config describes far more than its files hold.

    transformers would build all of it first, which can take the machine's memory, or for ever.
    """
    files = Path(name).expanduser().glob("*.safetensors")
    held = sum(file.stat().st_size for file in files if file.is_file())
    text: Any = config.get_text_config()
    sizes = [getattr(text, key, 0) for key in ("num_hidden_layers", "hidden_size", "vocab_size")]
    if not held or not all(type(size) is int for size in sizes):
        return
    layers, hidden, vocabulary = sizes
    described = layers * hidden**2 + vocabulary * hidden  # at the least
    if described > 16 * held + 2**24:
        raise UserError(
            f"model {name}: give a complete model; config.json describes far more weights than fit "
            f"into its files' {held:,} bytes"
        )


def load_model_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's config alone, without its weights; of an adapter, its base's."""
    from transformers import AutoConfig

    name = _model_name(settings)
    base = adapted_model(settings, name)
    return load_model_config(base) if base else _load(AutoConfig, name, settings, "model")


def adapted_model(settings: ModelSettings, name: str) -> ModelSettings | None:
    """The settings, naming the model that the adapter ``name`` is for; None for a model."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(name).expanduser()
    if is_model(folder) or (_looks_local(name) and not folder.is_dir()):
        return None
    where = str(folder) if folder.is_dir() else name
    try:
        path = find_adapter_config_file(where, revision=_revision(settings, name))
    except (OSError, ValueError):  # no such model; loading it says so
        return None
    if path is None:
        return None
    with refusals(f"adapter {name}: {path} cannot be read", OSError, ValueError, TypeError):
        config = read_json(Path(path))
        base = dict(config).get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"adapter {name}: write base_model_name_or_path into its adapter_config.json, the "
            "folder or hub name of the model that it was trained on"
        )
    if _looks_local(base) and not Path(base).expanduser().is_dir():
        raise UserError(
            f"adapter {name}: its base model is no longer at {base}; write where it is now as "
            "base_model_name_or_path into adapter_config.json"
        )
    adapted = copy.copy(settings)
    adapted.model_name_or_path = base
    adapted.model_revision = config.get("revision") or "main"
    return adapted


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's embedding, known also where ZeRO-3 has split the weight."""
    return model.config.get_text_config().vocab_size


def context_of(config: Any) -> int | None:
    """The most tokens the model takes, prompt and answer together; None where it does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
    return next((limit for name in names if (limit := getattr(text, name, None))), None)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _revision(settings: ModelSettings, name: str) -> str:
    return settings.model_revision if name == settings.model_name_or_path else "main"


def _model_name(settings: ModelSettings) -> str:
    if not settings.model_name_or_path:
        raise UserError("model_name_or_path: none is given; set it to a folder or a hub name")
    return settings.model_name_or_path


def _load(loader: Any, name: str, settings: ModelSettings, what: str, **options: Any) -> Any:
    """``from_pretrained``; whatever goes wrong becomes one line."""
    path = Path(name)
    looks_local = _looks_local(name)
    if looks_local and not path.expanduser().is_dir():
        raise UserError(f"{what} {name}: no such folder")
    if path.is_dir() and not (path / "config.json").is_file() and what == "model":
        raise UserError(f"model {name}: the folder has no config.json; give a saved model's folder")
    with refusals(f"{what} {name}: cannot be loaded", Exception):
        try:
            return loader.from_pretrained(
                str(path.expanduser()) if looks_local else name,
                revision=_revision(settings, name),
                trust_remote_code=settings.trust_remote_code,
                **options,
            )
        except ValueError as error:
            if "trust_remote_code=True" not in str(error):
                raise
            raise UserError(
                f"{what} {name}: read the Python code that comes with it, then set "
                "trust_remote_code: true to run that code"
            ) from error


def prepared_head(lm: PreTrainedModel, args: PreferenceConfig) -> Scoring:
    """Patch the head, without dropout if so set; and take one GPU where several are seen."""
    if args.disable_dropout:
        disable_dropout(lm)
    if args.n_gpu > 1:
        logger.warning("Using one of %d GPUs; for all, start with accelerate launch", args.n_gpu)
        args._n_gpu = 1
    refuse_sharded(lm)
    return patch_head(bare_model(lm), **args.head_settings, figures=args.token_metrics)


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout to zero, layers and functional ones alike.

    Layers keep it as ``p``. Families that call the function keep it in a number of their own, under
    a name with "drop" in it: ``dropout``, ``attn_dropout``, ``attention_dropout``, ``layerdrop``.
    Some (Persimmon, ProphetNet) read the config in every forward, so its numbers become zero too,
    and are saved so with the model.
    """
    from torch.nn.modules.dropout import _DropoutNd

    modules: Any = model.modules()
    configs: Any = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name.lower():
                setattr(module, name, 0.0)
