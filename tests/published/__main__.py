"""``python -m tests.published --simpo DIR --gamma-po DIR --lmpo DIR``: their loss code beside ours.

Each DIR is a checkout of the published repository, of which the loss functions, the chat rendering
and the tokenization are read and run as they stand, in this environment and without their imports;
nothing of it is kept here. The same random log-probs and the same rows go through both, and a table
of the largest differences is printed. Exits with 1 where one is larger than is explained.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import OK, Limits
from widemargin.trainer.data.template import read_chat_template
from widemargin.trainer.objectives import build_objective

from tests.published.original import functions
from tests.support.chat_tokenizers import GEMMA2_OPEN, family_tokenizer

HOW = """\
No checkout is named. Get those that you want to compare with, and name them:
  git clone https://github.com/princeton-nlp/SimPO
  git clone https://github.com/sunjie279/gammaPO
  git clone https://github.com/gengxuli/LMPO
  python -m tests.published --simpo SimPO --gamma-po gammaPO --lmpo LMPO"""

PAIRS, TOLERANCE = 6, 1e-9
SETTINGS = {"beta": 2.0, "gamma_beta_ratio": 0.4, "label_smoothing": 0.0, "tau": 3.0, "flip": 0}

#: Repository, its file and function, its loss_type, our objective, and a departure that explains.
LOSSES = [
    ("simpo", "simpo_trainer.py", "simpo_loss", "sigmoid", "simpo", ""),
    ("simpo", "simpo_trainer.py", "simpo_loss", "hinge", "hinge", ""),
    ("gamma_po", "simpo_trainer.py", "simpo_loss", "simpo", "simpo", ""),
    ("gamma_po", "simpo_trainer.py", "simpo_loss", "gm-simpo", "gamma-simpo", ""),
    ("gamma_po", "simpo_trainer.py", "simpo_loss", "cpo", "cpo", ""),
    ("gamma_po", "simpo_trainer.py", "simpo_loss", "orpo", "orpo", ""),
    ("gamma_po", "xpo_trainer.py", "xpo_loss", "dpo", "dpo", ""),
    ("gamma_po", "xpo_trainer.py", "xpo_loss", "ipo", "ipo", ""),
    ("gamma_po", "xpo_trainer.py", "xpo_loss", "kto", "kto", ""),
    ("gamma_po", "xpo_trainer.py", "xpo_loss", "gm-dpo", "gamma-dpo", ""),
    ("gamma_po", "xpo_trainer.py", "xpo_loss", "r-dpo", "r-dpo", "batch sizes as lengths"),
    ("lmpo", "lmpo_trainer.py", "lmpo_loss", "sigmoid", "lmpo", "the released trainer"),
]

OURS = {
    "ipo": {"beta": 0.4, "length_norm": True},
    "cpo": {"beta": 2.0, "alpha": 0.4, "length_norm": True},
    "orpo": {"alpha": 0.4},
    "dpo": {"beta": 2.0, "length_norm": True},
    "kto": {"beta": 2.0, "length_norm": True},
    "r-dpo": {"beta": 2.0, "alpha": 0.4, "length_norm": True},
    "gamma-simpo": {"beta": 2.0, "gamma_beta_ratio": 0.4, "tau": 3.0},
    "gamma-dpo": {"beta": 2.0, "gamma_beta_ratio": 0.4, "tau": 3.0, "length_norm": True},
    "lmpo": {"beta": 2.0, "gamma_beta_ratio": 0.4, "zscore_bias_correction": False},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.published", description=__doc__)
    for name in ("simpo", "gamma-po", "lmpo"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    places = vars(parser.parse_args(argv))
    if not any(places.values()):
        print(HOW)
        return 2
    lines = []
    for place, file, function, theirs, ours, why in LOSSES:
        if places[place]:
            found = _loss_difference(places[place], file, function, theirs, ours)
            lines.append((f"{place} {theirs}", ours, *found, why))
    if places["simpo"]:
        lines += list(_row_differences(places["simpo"]))
    for theirs, ours, shown, why in [
        ("theirs", "ours", "largest difference", "explained by"),
        *((theirs, ours, shown, why) for theirs, ours, shown, _, why in lines),
    ]:
        print(f"{theirs:<28}{ours:<14}{shown:<32}{why}".rstrip())
    return int(any(not small and not why for *_, small, why in lines))


def _loss_difference(
    place: Path, file: str, function: str, loss: str, objective: str
) -> tuple[str, bool]:
    """The largest difference of a pair's loss, and whether it is within rounding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (2 * PAIRS,), generator=generator)
    token_logps = -torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
    reference = -torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64) * lengths
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    means = torch.stack([part.mean() for part in token_logps.split(lengths.tolist())])
    given = OURS.get(objective, {"beta": 2.0, "gamma_beta_ratio": 0.4})
    ours = build_objective(objective, **given)
    needs = ours.needs_reference
    found = ours.train()(token_logps, ends, reference if needs else None).losses
    trainer = SimpleNamespace(
        **SETTINGS,
        loss_type=loss,
        gamma0=0.8,
        eps=1e-10,
        opt_size=256,
        reward_gap_queue=collections.deque(),
        accelerator=SimpleNamespace(device="cpu"),
    )
    known = {"torch": torch, "F": functional, "random": random, "print": lambda *_: None}
    names = [function, "get_gamma_dq"]
    for name, it in functions(place / "scripts" / file, names, known).items():
        setattr(trainer, name, it.__get__(trainer))
    halves = [*means.chunk(2)]
    if needs:
        halves += [*(reference / lengths).chunk(2), PAIRS, PAIRS]
    try:
        theirs = getattr(trainer, function)(*halves)[0]
    except (AttributeError, NameError) as error:
        return f"does not run: {type(error).__name__}", False
    if objective == "kto":
        theirs = theirs.reshape(2, PAIRS).mean(0)
    apart = float((theirs - found).abs().max())
    return f"{apart:.1e} of {float(found.abs().max()):.2f}", apart < TOLERANCE


def _row_differences(place: Path) -> list[tuple[str, str, str, bool, str]]:
    """Token ids of rows, by their rendering and tokenization and by ours."""
    known: dict[str, Any] = {"np": np, "Any": Any, "Dict": dict, "Literal": _Any()}
    known |= {"Optional": _Any(), "Union": _Any(), "PreTrainedModel": 0, "nn": torch.nn}
    data = ["maybe_insert_system_message", "is_openai_format"]
    known |= functions(place / "alignment" / "data.py", data, known)
    script = place / "scripts" / "run_simpo.py"
    render = functions(script, ["apply_chat_template"], known, ["MISTRAL_CHAT_TEMPLATE"])
    rows = functions(
        place / "scripts" / "simpo_trainer.py", ["build_tokenized_answer", "tokenize_row"], known
    )
    lines = []
    for family in ("llama3", "gemma2", "mistral", "mistral, newer file", "qwen2.5"):
        lines.append((f"rows, {family}", "separate", *_family_rows(family, render, rows), ""))
    return lines


class _Any:
    """Stands for what annotations are made of."""

    def __getitem__(self, _: Any) -> Any:
        return self


def _family_rows(family: str, render: Any, rows: Any) -> tuple[str, bool]:
    change = "mistral" if family.startswith("mistral") else None
    templates = {"gemma2": GEMMA2_OPEN} | (
        {family: read_chat_template("mistral")} if change else {}
    )
    theirs, ours = (family_tokenizer(family, templates.get(family)) for _ in range(2))
    if theirs.bos_token is None:
        return "does not run: no BOS", True
    trainer = SimpleNamespace(
        tokenizer=theirs, is_encoder_decoder=False, label_pad_token_id=-100,
        max_length=40, max_prompt_length=16, truncation_mode="keep_end",
    )  # fmt: skip
    for name, it in rows.items():
        setattr(trainer, name, it.__get__(trainer))
    tokenize = PairTokenizer(
        ours, Limits(40, 16, None, "keep_end"), Rendering(separate=True, empty_system=True)
    )
    count = differ = 0
    for n in range(1, 60):
        asked = ("yes maybe " * n)[: 3 * n] + "?"
        texts = (asked, "Yes, it is. " * (1 + n % 5), "no " * (1 + n % 7))
        user, good, bad = (
            {"role": role, "content": text.strip()}
            for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)
        )
        row = {"chosen": [user, good], "rejected": [user, bad]}
        done = tokenize({key: [value] for key, value in copy.deepcopy(row).items()})
        if done["status"][0] != OK:
            continue
        text = render["apply_chat_template"](row, theirs, "simpo", True, change)
        parts = {part: text[f"text_{part}"] for part in ("prompt", "chosen", "rejected")}
        made = trainer.tokenize_row(parts)
        count += 1
        differ += any(
            list(made[f"{side}_input_ids"]) != [*done["prompt_ids"][0], *done[f"{side}_ids"][0]]
            for side in ("chosen", "rejected")
        )
    return f"{differ} of {count} rows", differ == 0 and count > 0


if __name__ == "__main__":
    sys.exit(main())
