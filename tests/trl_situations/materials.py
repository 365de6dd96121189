"""Models, tokenizers and data sets that the situations name: tiny, random, made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
)
from widemargin.trainer.model import stand_in

from tests.robustness.families import tiny
from tests.support.tiny_models import SHAPE, TOKENIZER, tiny_model, tiny_pairs
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer

COUNT = 5

#: A template with an argument of its own, and one that writes tools, calls and reasoning.
SHOUTING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ 'LOUD' if loud else 'soft' }}\n"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ 'LOUD' if loud else 'soft' }}\n{% endif %}"
)
CALLING = (
    "{{ bos_token }}{% if tools %}<|system|>\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.thinking %}({{ m.thinking }}) {% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def _pairs() -> list[dict[str, Any]]:
    return tiny_pairs(COUNT, seed=7).to_list()


def standard() -> Dataset:
    return Dataset.from_list(_pairs())


def implicit() -> Dataset:
    """The prompt is the beginning that both sides share."""
    rows = _pairs()
    return Dataset.from_list(
        [{s: r["prompt"] + r[s] for s in ("chosen", "rejected")} for r in rows]
    )


def _spoken(row: dict[str, Any]) -> dict[str, Any]:
    sides = {side: [turn("assistant", row[side])] for side in ("chosen", "rejected")}
    return {"prompt": [turn("user", row["prompt"])], **sides}


def conversational() -> Dataset:
    return Dataset.from_list([_spoken(row) for row in _pairs()])


def conversational_implicit() -> Dataset:
    rows = [_spoken(row) for row in _pairs()]
    return Dataset.from_list(
        [{s: r["prompt"] + r[s] for s in ("chosen", "rejected")} for r in rows]
    )


def unpaired() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": r["chosen" if i % 2 else "rejected"],
             "label": bool(i % 2)}
            for i, r in enumerate(_pairs())
        ]
    )  # fmt: skip


def conversational_unpaired() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [turn("user", r["prompt"])], "label": r["label"],
             "completion": [turn("assistant", r["completion"])]}
            for r in unpaired().to_list()
        ]
    )  # fmt: skip


def with_template_arguments() -> Dataset:
    said = [{"loud": bool(i % 2)} for i in range(COUNT)]
    return conversational().add_column("chat_template_kwargs", said)  # pyright: ignore


def tool_calls() -> Dataset:
    """A call and its result in the prompt; the tools as a column of JSON, as TRL's have them."""
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Paris"}}}
    called = [turn("assistant", "", tool_calls=[call]), turn("tool", "yes", name="weather")]
    sides = {"chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no no")]}
    rows = [
        {"prompt": [turn("user", row["prompt"]), *called], **sides, "tools": json.dumps([tool])}
        for row in _pairs()
    ]
    return Dataset.from_list(rows)


def harmony() -> Dataset:
    """Answers that think first, and arguments of the template beside them."""
    rows = [
        {
            "prompt": [turn("system", "Answer briefly."), turn("user", r["prompt"])],
            "chosen": [turn("assistant", r["chosen"], thinking="yes yes")],
            "rejected": [turn("assistant", r["rejected"], thinking="maybe")],
            "chat_template_kwargs": {"reasoning_effort": "low"},
        }
        for r in _pairs()
    ]
    return Dataset.from_list(rows)


def images(count: int = 1) -> Dataset:
    from PIL import Image

    picture = Image.new("RGB", (16, 16))
    look = [turn("user", [{"type": "image"}] * count + [{"type": "text", "text": "What is it?"}])]
    rows = [
        {
            "images": [picture] * count,
            "prompt": look,
            "chosen": [turn("assistant", [{"type": "text", "text": "yes"}])],
            "rejected": [turn("assistant", [{"type": "text", "text": "no no"}])],
        }
    ]
    return Dataset.from_list(rows * COUNT)


def labelled(pairs: Dataset) -> Dataset:
    """The chosen answers alone, every second of them said to be undesirable."""
    rows = pairs.remove_columns("rejected").rename_column("chosen", "completion")
    return rows.add_column("label", [bool(i % 2) for i in range(len(rows))])  # pyright: ignore


def one_prompt_too_long(labelled: bool = False) -> Dataset:
    """Of two rows, the second's prompt alone fills six tokens."""
    prompts = ["yes", "Is water wet? yes yes no no maybe maybe I am not sure about that"]
    if labelled:
        rows = {"prompt": prompts, "completion": [" yes", " no"], "label": [True, False]}
    else:
        rows = {"prompt": prompts, "chosen": [" yes"] * 2, "rejected": [" no"] * 2}
    return Dataset.from_dict(rows)


DATA: dict[str, Callable[[], Any]] = {
    "standard": standard,
    "implicit": implicit,
    "conversational": conversational,
    "conversational implicit": conversational_implicit,
    "unpaired": unpaired,
    "conversational unpaired": conversational_unpaired,
    "template arguments": with_template_arguments,
    "tool calls": tool_calls,
    "harmony": harmony,
    "images": images,
    "several images": lambda: images(2),
    "labelled images": lambda: labelled(images()),
    "several labelled images": lambda: labelled(images(2)),
    "labelled template arguments": lambda: labelled(with_template_arguments()),
    "labelled tool calls": lambda: labelled(tool_calls()),
    "labelled harmony": lambda: labelled(harmony()),
    "too long": one_prompt_too_long,
    "too long, labelled": lambda: one_prompt_too_long(labelled=True),
    "none": lambda: None,
}


def data(name: str) -> Any:
    """A data set by its name, as it is or in the form that stands after a colon."""
    kind, _, form = name.partition(": ")
    rows = DATA[kind]()
    if not form:
        return rows
    rows = rows.to_iterable_dataset() if "stream" in form else rows
    if form in ("set", "stream"):
        return rows
    both = {"data1": rows, "data2": rows}
    if form.startswith("dict of"):
        return both
    return (IterableDatasetDict if "stream" in form else DatasetDict)(both)


_EYES = {
    "hidden_size": 16, "embed_dim": 16, "out_hidden_size": 32, "intermediate_size": 16,
    "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2, "num_heads": 2,
    "image_size": 28, "patch_size": 14, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def vision(family: str) -> Any:
    """A small model of images and text."""
    if family == "gemma4":
        return tiny(family)
    torch.manual_seed(0)
    text = SHAPE | ({"rope_parameters": _SECTIONS} if "vl" in family else {})
    eyes = _EYES | ({"hidden_size": 32} if family == "qwen2_vl" else {})
    config = AutoConfig.for_model(family, text_config=text, vision_config=eyes)
    return stand_in.built(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config)


def remote(folder: Path) -> str:
    """A model whose class comes in a file beside it."""
    tiny_model().save_pretrained(folder / "remote")
    TOKENIZER.save_pretrained(folder / "remote")
    (folder / "remote" / "coded.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class CodedConfig(LlamaConfig):\n    model_type = 'coded'\n\n\n"
        "class CodedModel(LlamaForCausalLM):\n    config_class = CodedConfig\n"
    )
    path = folder / "remote" / "config.json"
    content = json.loads(path.read_text()) | {
        "model_type": "coded",
        "auto_map": {"AutoConfig": "coded.CodedConfig", "AutoModelForCausalLM": "coded.CodedModel"},
    }
    path.write_text(json.dumps(content))
    return str(folder / "remote")


def by_name(folder: Path) -> str:
    tiny_model("qwen2").save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    return str(folder / "model")


def seq2seq() -> Any:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=SHAPE["vocab_size"], **sizes)
    )


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def model(name: str, folder: Path) -> Any:
    """A model, or its folder, by a family's name or another here."""
    if name == "by name":
        return by_name(folder)
    if name == "remote code":
        return remote(folder)
    if name == "t5":
        return seq2seq()
    if name == "in an adapter":
        return get_peft_model(tiny_model("qwen2"), LoraConfig(task_type="CAUSAL_LM"))
    if name == "experts in an adapter":
        adapter = LoraConfig(target_parameters=EXPERTS, task_type="CAUSAL_LM")
        return get_peft_model(tiny("gpt_oss"), adapter)
    if name.startswith("vision "):
        return vision(name.removeprefix("vision "))
    return tiny(name)


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"]),
    "lora with dropout": lambda: LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
        target_modules="all-linear",
    ),
    "experts": lambda: LoraConfig(target_parameters=EXPERTS),
    "lm_head": lambda: LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"]),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
}  # fmt: skip

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: TOKENIZER,
    "without padding": lambda: _without_padding(),
    "shouting": lambda: tiny_tokenizer(SHOUTING),
    "calling": lambda: tiny_tokenizer(CALLING),
    "with a template": lambda: tiny_tokenizer(WITH_BOS),
    "left out": lambda: None,
}


def _without_padding() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


QUANTIZED = BitsAndBytesConfig(load_in_8bit=True)
