"""The model and pairs that whole steps are measured on, where the user names none.

Beside the project's own checkout there is a small trained model with real pairs. Where that is
absent, as in any other clone, a stand-in takes its place: random weights of the same shape, and
answers strung together from the quickstart's sentences. Rows say so by their case. Random weights
leave routing nothing to skip, so that the stand-in shows what packing and memory gain, but not
what the head does on a trained model.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.record import ROOT

SHARED = ROOT.parent / "shared" / "data"
STAND_IN = "random-11m"
SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
"""The trained model's, whose head is most of its parameters."""
PAIRS, SENTENCES, SPREAD = 500, (40, 30), 0.6
"""Pairs, median sentences of a chosen and a rejected answer, standard deviation of their log."""


@dataclass(frozen=True)
class Subject:
    model: Path  # folder
    pairs: Path  # JSONL of messages, perhaps gzipped

    @property
    def case(self) -> str:
        return self.model.name


def find_subject(folder: Path) -> Subject:
    """The shared model, or a stand-in, which is written to ``folder``."""
    model, pairs = SHARED / "small_lm", SHARED / "judged_pairs_train.jsonl.gz"
    return Subject(model, pairs) if model.is_dir() and pairs.is_file() else stand_in(folder)


def fill_in(options: argparse.Namespace, folder: Path) -> None:
    """Set `model` and `pairs` where the user named none."""
    if options.model is None or options.pairs is None:
        subject = find_subject(folder)
        options.model = options.model or subject.model
        options.pairs = options.pairs or subject.pairs


def stand_in(folder: Path, **shape: int) -> Subject:
    """A model and pairs made from a seed; ``shape`` changes the model's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from widemargin.trainer.quickstart.data import make_pairs
    from widemargin.trainer.quickstart.model import make_tokenizer

    train, test = make_pairs(0)
    tokenizer = make_tokenizer([*train, *test])
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in names}
    config = AutoConfig.for_model("llama", **SHAPE | shape | ids)
    subject = Subject(folder / STAND_IN, folder / "pairs.jsonl")
    AutoModelForCausalLM.from_config(config).save_pretrained(subject.model)
    tokenizer.save_pretrained(subject.model)
    generator = random.Random(0)
    rows = []
    for _ in range(PAIRS):
        prompt = generator.choice(train).prompt
        answers = {}
        for side, median in zip(("chosen", "rejected"), SENTENCES, strict=True):
            count = max(1, round(median * generator.lognormvariate(0, SPREAD)))
            text = " ".join(getattr(pair, side) for pair in generator.choices(train, k=count))
            answers[side] = [{"role": "assistant", "content": text}]
        rows.append({"prompt": [{"role": "user", "content": prompt}], **answers})
    subject.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return subject
