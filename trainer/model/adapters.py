"""LoRA and QLoRA through peft: its configs, and wrapping a model so that its head stays plain."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UserError
from ..files import read_json
from ..settings.model import AdapterSettings
from .folder import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = ADAPTER[1]
SAME_AT_FIRST = (True, "gaussian", "eva")
"""Ways to initialise LoRA that leave the base unchanged and let the adapter add nothing."""

LEAVE_OUT = (
    "leave lm_head, and an embedding tied to it, out of the adapter's target_modules, "
    "modules_to_save and trainable_token_indices"
)


def lora_config(settings: AdapterSettings) -> Any:
    """The ``peft.LoraConfig`` of these settings; None without ``use_peft``."""
    if not settings.use_peft:
        return None
    from peft import LoraConfig

    targets = settings.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets is None else targets,
        target_parameters=settings.lora_target_parameters,
        modules_to_save=settings.lora_modules_to_save,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def quantization_config(settings: AdapterSettings, compute_dtype: str) -> Any:
    """The ``BitsAndBytesConfig`` of these settings; None without quantization."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
    )


def with_adapter(model: PreTrainedModel, peft_config: Any, *, warns: bool = True) -> Any:
    """The patched model in an adapter that leaves its head alone.

    ``warns`` is for one rank: of target modules that the model lacks, while it has others.

    Raises:
        UserError: an adapter on lm_head or on an embedding that shares its weight, one that adds
            tokens to the prompt, or module names that the model does not have.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"peft_config: {type(peft_config).__name__} adds virtual tokens, which shift where "
            "completions are predicted; use LoRA or another adapter of weights"
        )
    injected = any(isinstance(part, BaseTunerLayer) for part in model.modules())
    if injected or hasattr(model, "get_base_model"):
        raise UserError(
            "peft_config: the model has an adapter already; leave peft_config and use_peft out to "
            "go on with it"
        )
    head: Any = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.enable_input_require_grads()  # for reentrant checkpointing; peft does it elsewhere
    _leave_tower(model, peft_config)
    _leave_experts(model, peft_config)
    try:
        with without_peft_warnings():
            adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise UserError(
                "lora_dropout: set it to 0; the adapter of an expert's or another bare parameter "
                "has no dropout"
            ) from error
        raise UserError(f"peft_config: {' '.join(str(error).split())[:400]}") from error
    if tied and model.get_input_embeddings() is not embedding:
        raise UserError(
            "peft_config: it trains the embedding, whose weight is also lm_head's here "
            "(tie_word_embeddings), and would part them; leave the embedding out of "
            "target_modules, modules_to_save and trainable_token_indices"
        )
    adapted_head = model.get_output_embeddings()
    if adapted_head is not head or isinstance(adapted_head, BaseTunerLayer):
        raise UserError(
            "peft_config: it puts an adapter on lm_head, which the head without logits cannot "
            "take; leave lm_head out of target_modules and modules_to_save"
        )
    for setting, missing in _missing(adapted).items() if warns else ():
        logger.warning(
            "%s: correct %s, or leave it out; the model has no such module, and the others alone "
            "learn",
            *(setting, ", ".join(missing)),
        )
    return adapted


def _missing(adapted: Any) -> dict[str, list[str]]:
    """Names among the adapter's modules that the model does not have; peft says nothing of them."""
    config, found = adapted.active_peft_config, {}
    there = [name for name, _ in adapted.named_modules()]
    # peft compares whole names of the former, and the ends of names of the latter.
    for kind, dot in (("target_modules", "."), ("modules_to_save", "")):
        given = getattr(config, kind, None)
        given = given if isinstance(given, list | set | tuple) else ()
        absent = [each for each in given if not any(f".{n}".endswith(dot + each) for n in there)]
        found |= {f"lora_{kind}": sorted(absent)} if absent else {}
    return found


def refuse_both(model: Any, name: str) -> None:
    """Raise ``UserError`` where transformers put an adapter, of the same folder, into ``model``."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {name}: keep a full model or an adapter there, without the other's files; it "
            "has both, and transformers would take the adapter's base"
        )


def _leave_tower(model: Any, peft_config: Any) -> None:
    """Keep "all-linear" to the language model where the model also has one for images or sound."""
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return
    if getattr(peft_config, "exclude_modules", True):
        return  # someone chose, or an adapter that cannot
    decoder, inner = model.get_decoder(), model.base_model
    names = [n for n, part in inner.named_children() if part is not decoder]
    if decoder is not inner and any(part is decoder for part in inner.children()) and names:
        peft_config.exclude_modules = rf"(.*\.)?({'|'.join(names)})(\..*)?"


def _leave_experts(model: PreTrainedModel, peft_config: Any) -> None:
    """Spell out "all-linear" where peft would add a mixture's router and experts to it.

    peft reads the names of layers that once were linear (``gate``, ``gate_proj``) as names of the
    parameters that hold all experts now, in families whose files transformers converts on load.
    """
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older peft, which translates nothing
        return

    def stays(targets: Any) -> bool:
        config = copy.deepcopy(peft_config)
        config.target_modules, config.target_parameters = targets, None
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one of two layers that are one parameter now
            return False
        return not config.target_parameters

    if not stays("all-linear"):
        names = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        }
        peft_config.target_modules = sorted(name for name in names if stays({name}))


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Silences the warning of transformers 5 about a name that peft still asks a model for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def put_adapter(model: PreTrainedModel, name: str, revision: str, *, learns: bool = False) -> Any:
    """``model`` in the adapter ``name``, a folder or hub name.

    An adapter of a model whose vocabulary was resized has the new embedding; the model gets its
    size first.
    """
    from peft import PeftModel

    if Path(name).is_dir() and not any(Path(name, file).is_file() for file in ADAPTER[1:]):
        raise UserError(
            f"adapter {name}: copy its weights there too, {ADAPTER_WEIGHTS}; it has none of them"
        )
    rows = _rows_of_embedding(model, name, revision)
    if rows not in (None, model.get_input_embeddings().num_embeddings):
        model.resize_token_embeddings(rows, mean_resizing=False)
    with without_peft_warnings():
        return PeftModel.from_pretrained(model, name, is_trainable=learns, revision=revision)


def _rows_of_embedding(model: PreTrainedModel, name: str, revision: str) -> int | None:
    """Of the embedding saved with an adapter; None if there is none."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    weights = cached_file(
        name, ADAPTER_WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if weights is None:  # pickled ones, of an old peft
        return None
    embedding = model.get_input_embeddings()
    places = [place for place, module in model.named_modules() if module is embedding]
    inner = ("", "token_adapter.base_layer.")  # the latter with trainable_token_indices
    names = {f"base_model.model.{place}.{part}weight" for place in places for part in inner}
    with safe_open(weights, "pt") as file:
        keys = names & set(file.keys())
        return file.get_slice(keys.pop()).get_shape()[0] if keys else None


def bare_model(model: Any) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model as its base is, whatever adapters it has."""
    with model.disable_adapter() if hasattr(model, "get_base_model") else nullcontext():
        yield


def name_base(folder: Path, revision: str) -> None:
    """Let a saved adapter say which model it belongs to: a full path, or a hub name and revision.

    peft's model card is removed, which names the path too.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    base = config.get("base_model_name_or_path")
    if base and Path(base).expanduser().is_dir():
        config["base_model_name_or_path"] = str(Path(base).expanduser().absolute())
    elif base and not config.get("revision"):
        config["revision"] = revision
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def starts_as_its_base(peft_config: Any) -> bool:
    """Whether a fresh adapter adds nothing at first, so that the model equals its base."""
    return getattr(peft_config, "init_lora_weights", False) in SAME_AT_FIRST


def learnable_line(model: nn.Module) -> str:
    """How many of the model's parameters train, for the log."""
    counts = [
        (getattr(p, "ds_numel", p.numel()), p.requires_grad)
        for p in model.parameters()  # quantized ones pack two into an element
    ]
    learnable = sum(count for count, trains in counts if trains)
    total = sum(count for count, _ in counts)
    return f"{learnable:,} of {total:,} parameters learn ({learnable / max(total, 1):.2%})"
