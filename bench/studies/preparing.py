"""What all runs of a study share: pairs that fit whole, and the model they start from."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.training.data import read_pairs


@cache
def prepare_pairs(source: Path, tokenizer_dir: Path, limit: int, target: Path) -> Path:
    """Write to ``target`` the pairs of ``source`` (JSONL, perhaps gzipped) that fit whole.

    Longer pairs are left out rather than cut: where an answer ends is part of what a study of
    lengths is about.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    fitting = []
    for row in read_pairs(source):
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        if not isinstance(texts[0], str):
            texts = [tokenizer.apply_chat_template(text, tokenize=False) for text in texts]
        tokens = tokenizer(texts, add_special_tokens=False).input_ids
        if max(map(len, tokens)) <= limit:
            fitting.append(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in fitting))
    return target


def prepare_model(source: Path, factor: float, work: Path) -> Path:
    """Save the model of ``source`` with logits ``factor`` times as large, once; its folder.

    The norm before lm_head takes the factor: the same function as a ``logit_scale``, for models
    that have none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = work / f"model-{fingerprint(source)}-x{factor:g}"
    if (target / "tokenizer_config.json").exists():  # what is saved last
        return target
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.get_decoder().norm.weight.mul_(factor)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def fingerprint(path: Path) -> str:
    """Of a file, or of the weights in a model's folder."""
    file = path if path.is_file() else path / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
