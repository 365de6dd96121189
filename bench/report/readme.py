"""README's claim and its table, from the rows of whole training steps and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from bench.lib.noise import noises
from bench.lib.record import Row
from bench.lib.table import markdown
from bench.report.page import REAL, File
from bench.training.contenders import BASES, SHAPES
from bench.training.table import same_case, variant

BEST, TREES = "widemargin-prefix_shared", "widemargin-trees"
BY_PROMPT = ", by prompt"
"""Ends the names of cases that train on all pairs of each prompt."""
NAMES = {
    "cpu": "two CPU cores",
    "small_lm": "a model of 11M parameters",
    "random-11m": "a random model of 11M parameters",
}
TRAINERS = {"trl-cpo": "`CPOTrainer`", "trl-dpo": "`DPOTrainer`"}
OUR_HEAD = "trl-dpo-our-head"
OBJECTIVES = {"simpo": "SimPO", "dpo": "DPO", "lmpo": "LMPO"}
COLUMNS = ("training step", "pairs/s", "TRL's pairs/s", "times as fast", "memory, of TRL's")


def compared(files: Iterable[File]) -> list[list[Row]]:
    """The cases of README: the real model's, or the small model's where it was not measured.

    Each is the rows of one run, TRL's among them. A GPU's come first.
    """
    rows = [row for f in files if f.kind == "training" for row in f.rows if "step_ms" in row]
    cases: list[list[Row]] = []
    for row in rows:
        case = next((case for case in cases if same_case(case[0], row)), None)
        if case is None:
            cases.append([row])
        else:
            case.append(row)
    cases = [case for case in cases if _base(case) and not case[0]["long_prompts"]]
    real = [c for c in cases if c[0]["case"].startswith(REAL) or c[0]["device"] == "cuda"]
    return sorted(real or cases, key=lambda case: _order(case[0]))


def _order(row: Row) -> tuple[bool, str, int, bool, str, int]:
    """A GPU's first, then by model and objective; trees, variants, sizes after what they vary."""
    objective = list(OBJECTIVES).index(row["objective"])
    by_prompt, model = row["case"].endswith(BY_PROMPT), row["case"].removesuffix(BY_PROMPT)
    what = variant(row), row["pairs_per_step"]
    return row["device"] == "cpu", model, objective, by_prompt, *what


def _base(case: list[Row]) -> Row | None:
    return next((row for row in case if row["provider"] in BASES), None)


def claim(files: Iterable[File]) -> str:
    """One sentence: the first case that has our best layout, and the same with its trees."""
    cases = [case for case in compared(files) if not variant(case[0])]
    for case in cases:
        gain = _gain(case, BEST)
        if gain is None:
            continue
        row = case[0]
        device = NAMES.get(row["device"], row["device_name"])
        trees = next((c for c in cases if _trees_of(row, c)), [])
        more = _gain(trees, TREES)
        also = f"; with all pairs of each prompt, {more[0]}, in {more[1]}" if more else ""
        return (
            f"**On {device}, widemargin trains {NAMES.get(row['case'], row['case'])} with "
            f"{OBJECTIVES[row['objective']]} {gain[0]} as fast as TRL, in "
            f"{gain[1]} of the memory{also}.**"
        )
    raise ValueError("bench/results has no training steps beside TRL's; run `make bench-real`")


def _gain(case: list[Row], provider: str) -> tuple[str, str] | None:
    """How many times as fast as TRL a provider is, and its share of TRL's memory."""
    ours, base = next((row for row in case if row["provider"] == provider), None), _base(case)
    if ours is None or base is None:
        return None
    faster, memory = (ours[name] / base[name] for name in ("pairs_per_s", "peak_mib"))
    return f"{faster:.1f} times", f"{memory:.0%}"


def _trees_of(row: Row, case: list[Row]) -> bool:
    """Whether a case is of all pairs of each prompt, and else what this row's is."""
    same = all(case[0][name] == row[name] for name in ("objective", "device_name"))
    return same and case[0]["case"] == row["case"] + BY_PROMPT


def table(files: Iterable[File]) -> str:
    """One table for each device and model, a line for each step that was compared with TRL's."""
    groups: dict[tuple[str, str], list[list[Row]]] = {}
    for case in compared(files):
        model = case[0]["case"].removesuffix(BY_PROMPT)
        groups.setdefault((case[0]["device_name"], model), []).append(case)
    return "\n\n".join(_group(*named, cases) for named, cases in groups.items())


def _group(device: str, model: str, cases: list[list[Row]]) -> str:
    gaps = [gap for case in cases for row in case if (gap := row.get("largest_loss_gap"))]
    agree = f" Losses of a step differ by at most {max(gaps):.0e} of their value." if gaps else ""
    dtypes = ", ".join(dict.fromkeys(case[0]["dtype"] for case in cases))
    lines = [line for case in cases for line in _lines(case)]
    heading = f"{NAMES.get(model, model)}, {dtypes}; {device}.{agree}"
    return f"{heading}\n\n{markdown(COLUMNS, lines)}"


def _lines(case: list[Row]) -> list[list[str]]:
    """Our fastest layout against TRL's trainer, and that trainer with our head against itself."""
    base = _base(case)
    ours = [row for row in case if row["provider"].startswith("widemargin-")]
    assert base is not None
    lines = []
    if ours:
        best = max(ours, key=lambda row: row["pairs_per_s"])
        layout = best["provider"].removeprefix("widemargin-").replace("_", " ")
        lines.append(_line(f"{_step(best)}, {layout}{_noise(case)}", best, base))
    for row in case:
        if row["provider"] == OUR_HEAD:
            trainer = TRAINERS[base["provider"]]
            lines.append(_line(f"{_step(row)}, TRL's {trainer} with our head", row, base))
    return lines


def _step(row: Row) -> str:
    together = ", all of each prompt" if row["case"].endswith(BY_PROMPT) else ""
    step = f"{OBJECTIVES[row['objective']]}{variant(row)}"
    return f"{step}, {row['pairs_per_step']} pairs{together}"


def _line(step: str, row: Row, base: Row) -> list[str]:
    faster, memory = (row[name] / base[name] for name in ("pairs_per_s", "peak_mib"))
    speeds = [f"{each['pairs_per_s']:.2f}" for each in (row, base)]
    return [step, *speeds, f"{faster:.2f}", f"{memory:.0%}"]


def _noise(case: list[Row]) -> str:
    """A remark on a run that was not quiet, or whose noise nobody measured."""
    if any("spread" not in row for row in case):
        return "; its noise was not measured"
    spreads = {row["provider"]: row["spread"] for row in case}
    found = noises(max(row.get("others_load", 0.0) for row in case), spreads)
    return f"; a noisy run: {'; '.join(found)}" if found else ""


SHARES = {
    REAL: {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "Llama-3.2-1B": SHAPES["llama-1b"],
    "Llama-3-8B": SHAPES["llama-8b"],
}  # fmt: skip


def head_share(shape: dict[str, int]) -> float:
    """The head's part of the multiplications for one token; attention scores are not counted."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    values = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * values + 3 * hidden * shape["intermediate_size"]
    head = shape["vocab_size"] * hidden
    return head / (head + layers * layer)


def share_table() -> str:
    lines = [[name, f"{head_share(shape):.0%}"] for name, shape in SHARES.items()]
    return markdown(("model", "the head's share of a step"), lines)
