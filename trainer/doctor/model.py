"""What a run would make of a model, by its config and tokenizer, without its weights."""

from __future__ import annotations

from typing import Any

import torch

from ..data import chat
from ..data.turns import end_of_turn_id
from ..errors import UserError
from ..model.loading import load_model_config, load_tokenizer
from ..packing.choose import choose_packing
from ..settings.model import ModelSettings
from ..text import printable
from .findings import FAIL, GIB, OK, WARN, Finding, Findings

STATE_BYTES = 16
"""Per parameter trained: fp32 weight and gradient, and AdamW's two moments."""


def model_findings(name: str | None, device: str) -> Findings:
    """Size, attention, packing and chat template of the model ``name``, or of a plain Llama."""
    config: Any
    if name is None:
        from transformers import LlamaConfig

        config, whose = LlamaConfig(), "for a model like Llama"
    else:
        try:
            config = load_model_config(ModelSettings(model_name_or_path=name))
        except UserError as error:
            yield Finding(FAIL, "model", str(error))
            return
        whose = f"for {config.model_type}"
    try:
        empty = _without_weights(config)
    except Exception as error:  # each family fails in its own way
        detail = f"transformers cannot make a causal language model of it: {error}"
        yield Finding(FAIL, "model", printable(detail, 300), "name a decoder-only language model")
        return
    if name is not None:
        yield _size(empty, device)
    attention = empty.config.get_text_config()._attn_implementation
    yield Finding(OK, "attention", f"{attention}, transformers' choice {whose}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    packing = choose_packing("auto", empty.config, attention=attention, device=device, dtype=dtype)
    status = WARN if packing.layout == "padded" else OK
    compared = (
        "" if packing.layout == "padded" else "; compared with single sequences before training"
    )
    yield Finding(status, "packing", f"{packing.layout} ({packing.reason}){compared}")
    if name is not None:
        yield from _template(name)


def _without_weights(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _size(model: Any, device: str) -> Finding:
    count = sum(parameter.numel() for parameter in model.parameters())
    needed = STATE_BYTES * count / GIB
    detail = (
        f"{type(model).__name__}, {count / 1e6:,.1f} million parameters; training all of them "
        f"with AdamW takes {needed:,.1f} GiB besides activations"
    )
    if device == "cuda" and needed > torch.cuda.get_device_properties(0).total_memory / GIB:
        advice = "share it over GPUs (configs/accelerate), or train an adapter (use_peft: true)"
        return Finding(WARN, "model", f"{detail}, more than one GPU has", advice)
    return Finding(OK, "model", detail)


def _template(name: str) -> Findings:
    try:
        tokenizer = load_tokenizer(ModelSettings(model_name_or_path=name))
    except UserError as error:
        yield Finding(FAIL, "tokenizer", str(error))
        return
    if not tokenizer.chat_template:
        advice = "for data of messages, set chat_template: (mistral, zephyr, or a file)"
        yield Finding(WARN, "chat template", "the tokenizer has none", advice)
        return
    end = end_of_turn_id(tokenizer)
    if end is None:
        detail = "writes no special token after an answer, so answers would have no end"
        yield Finding(WARN, "chat template", detail, "set chat_template: to one that does")
        return
    bos = "begins with BOS" if chat.template_writes_bos(tokenizer) else "writes no BOS"
    token = printable(str(tokenizer.convert_ids_to_tokens(end)))
    yield Finding(OK, "chat template", f"the tokenizer's own; answers end with {token}, {bos}")
