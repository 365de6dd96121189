"""`make families`: every causal family of the installed transformers, tiny and random.

Each family in a process of its own (forked, so that nothing is imported twice), with a time-out:
its log-probs by the head and in the packing that training takes, against its own logits of each
sequence alone; then one training step. Results are kept in a file, so that a run that was stopped
goes on, and written as a page.

    python -m tests.robustness.families --out build/families.json --page docs/families.md
    python -m tests.robustness.families --only llama,gemma2       # a few, into the same file
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from widemargin.trainer.errors import UserError
from widemargin.trainer.model import stand_in
from widemargin.trainer.packing import model_inputs

from tests.robustness.family_sizes import NESTED, SPECIAL
from tests.support.packed_rows import alone, token_pairs
from tests.support.tiny_models import SHAPE, tiny_trainer

SECONDS = 150
APART = 1e-3
"""The largest difference of a log-prob in nats that rounding explains."""


def tiny(family: str) -> Any:
    """A tiny model of the family: of our usual sizes, or of its default config made small."""
    torch.manual_seed(0)
    sizes = SHAPE | {"initializer_range": 0.2} | SPECIAL.get(family, {})
    shapes: list[Any] = [
        lambda: AutoConfig.for_model(family, **NESTED.get(family, sizes)),
        lambda: AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if k != "head_dim"}),
        lambda: AutoConfig.for_model(family, **sizes | {"num_key_value_heads": 4}),
        lambda: AutoConfig.for_model(family, vocab_size=SHAPE["vocab_size"]),
        lambda: AutoConfig.for_model(family),
    ]
    problems = []
    for make, shrink in zip(
        shapes, (None, None, None, stand_in.shrunk, stand_in.shrunk), strict=True
    ):
        try:
            config = make() if shrink is None else shrink(make())
            config.get_text_config(decoder=True).is_decoder = True
            if sum(_sizes(config)) > 3e7:
                raise ValueError("its default config stays large")
            if shrink is None:
                model = AutoModelForCausalLM.from_config(config).float()
            else:
                model = stand_in.built(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
            with torch.no_grad():
                model(input_ids=torch.arange(5, 12)[None], use_cache=False)
            return model
        except Exception as error:
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise LookupError(problems[0])


def _sizes(config: Any) -> list[int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [parameter.numel() for parameter in model.parameters()]


def judge(family: str) -> dict[str, Any]:
    """What became of one family: status "right", "refused", "wrong" or "not tried", and why."""
    try:
        model = tiny(family)
    except LookupError as error:
        return {"status": "not tried", "reason": str(error)}
    facts: dict[str, Any] = {"class": type(model).__name__}
    rows = token_pairs(4, longest=12)
    try:
        with torch.no_grad():
            expected = alone(model.eval(), rows)
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(Path(folder), model.train(), max_steps=1)
            packing: Any = trainer.pipeline.packing
            model.eval()
            with torch.no_grad():
                found = model(**model_inputs(packing.collator(0)(rows))).token_logps
            apart = (found - expected).abs().max().item()
            facts |= {"packing": f"{packing.layout}, {packing.rows}", "apart": apart}
            if not apart <= APART:
                return facts | {"status": "wrong", "reason": f"{apart:.2g} nats apart"}
            before = [p.detach().clone() for p in model.parameters()]
            loss = trainer.train().training_loss
            moved = any(
                not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)
            )
    except UserError as error:
        return facts | {"status": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return facts | {"status": "wrong", "reason": f"{reason} ({Path(place.filename).name})"}
    if not moved or loss != loss:
        return facts | {"status": "wrong", "reason": f"a step gave loss {loss}, moved: {moved}"}
    return facts | {"status": "right", "reason": packing.reason}


def _child(family: str, path: str) -> None:
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        result = judge(family)
    Path(path).write_text(json.dumps(result), encoding="utf-8")


def sweep(families: list[str], results: dict[str, Any], out: Path) -> None:
    """Judge the families that ``results`` lack, each in a forked process; save after each."""
    context: Any = multiprocessing.get_context("fork")
    for family in families:
        if family in results:
            continue
        with tempfile.NamedTemporaryFile() as file:
            process = context.Process(target=_child, args=(family, file.name))
            process.start()
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
                results[family] = {"status": "not tried", "reason": f"more than {SECONDS} s"}
            else:
                text = Path(file.name).read_text(encoding="utf-8")
                died = {"status": "wrong", "reason": f"the process ended with {process.exitcode}"}
                results[family] = json.loads(text) if text else died
        print(family, results[family]["status"], results[family]["reason"][:100], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, sort_keys=True), encoding="utf-8")


PAGE = """# Families of models

Written by `make families`; do not edit it. It tries every causal family of transformers {version}
({total} of them) as a tiny model with random weights, on a CPU in fp32: the log-probs of the head,
in the packing that `packing: auto` takes, against the model's logits of each sequence alone (at
most {apart} nats apart), and one training step. {counts}.

- **right**: it trains, and these log-probs agree.
- **refused**: an error before training says why.
- **not tried**: no tiny model of it could be made here, or it took too long. Your model is still
  compared with its logits before training.
{wrong}
No GPU, no real checkpoint and no image took part. [Images](data-formats.md#images) have a table.

| family | result | packing, or the reason |
| --- | --- | --- |
{rows}
"""

WRONG = "- **wrong**: it fails in another way. Do not train it with this version.\n"


def page(results: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    lines = []
    for family in sorted(results):
        result = results[family]
        text = result["packing"] if result["status"] == "right" else result["reason"]
        text = text.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "")[:220]
        lines.append(f"| {family} | {result['status']} | {text} |")
    counts = Counter(result["status"] for result in results.values())
    return PAGE.format(
        version=transformers.__version__,
        total=len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        apart=APART,
        counts=", ".join(f"{n} {status}" for status, n in counts.most_common()).capitalize(),
        wrong=WRONG if counts["wrong"] else "",
        rows="\n".join(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Try every causal family of transformers.")
    parser.add_argument("--out", type=Path, default=Path("build/families.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", help="families to try again, with commas between them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    known = arguments.out.is_file()
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if known else {}
    families = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if arguments.only:
        families = arguments.only.split(",")
        results = {name: result for name, result in results.items() if name not in families}
    sweep(families, results, arguments.out)
    if arguments.page:
        arguments.page.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
