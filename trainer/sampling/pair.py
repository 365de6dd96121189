"""Scored answers -> training data, and a report: a pure function of the folder and the request."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..data.rows import RowProblem, attempt
from ..errors import UserError
from ..evaluation.models import read_tokenizer
from ..evaluation.pair_metrics import correlation
from ..evaluation.results import Record, read_records, table, write_json, write_jsonl
from ..evaluation.settings import LoadSettings
from .forms import SIDES, WRITERS
from .generate import tokenizer_digest
from .score import ANSWERED, check_scored
from .selection import BALANCE, REMEDIES, Chosen, Made, PairRequest, balanced, select


def pair(folder: Path, out: Path, request: PairRequest, scores: str | None = None) -> None:
    """Write the training data of ``folder`` to ``out``, and a report beside it."""
    request.check()
    if out.is_dir():
        raise UserError(
            f"--out: give a file's name, such as {out / 'pairs.jsonl'}; {out} is a folder"
        )
    if out.with_name(f"{out.stem}.settings.json").exists():
        raise UserError(f"--out: give another name; {out} holds records")
    settled, answers = read_records(folder, "answers", ANSWERED)
    prompts = read_records(folder, "prompts", ANSWERED)[1]
    if request.tokens_for is not None:
        _check_tokenizer(request.tokens_for, settled)
    name = _name_of_scores(folder, scores)
    done = read_records(folder, f"scores-{name}", "--scores: run widemargin score")[1]
    unit, made = _scored(prompts, answers, done, name)
    dropped: dict[str, str] = {}
    pairs: dict[str, list[Chosen]] = {}
    for key, several in made.items():
        found = attempt(select, several, request)
        if isinstance(found, RowProblem):
            dropped[key] = found.reason
        else:
            pairs[key] = found
    if request.balance_length:
        left = balanced(pairs)
        dropped |= {key: BALANCE for key in pairs if key not in left}
        pairs = left
    if not made:
        raise UserError(f"{ANSWERED}; {folder} has no prompts")
    if not pairs:
        remedy = REMEDIES[Counter(dropped.values()).most_common(1)[0][0]]
        raise UserError(f"{remedy}; no prompt of {folder} has a pair ({_counts(dropped)})")
    form = WRITERS["tokens" if request.tokens_for is not None else request.form]
    rows = [row for key, chosen in pairs.items() for row in form(prompts[key], chosen)]
    report = {"scores": name, "length_unit": unit, **_report(made, pairs, dropped, len(rows))}
    path = write_json(out.with_name(f"{out.stem}.report.json"), report)
    write_jsonl(out, rows)
    print("\n".join([*_lines(report), f"Written: {out}; prompts left out, by reason: {path}"]))


def _scored(
    prompts: dict[str, Record], answers: dict[str, Record], scores: dict[str, Record], name: str
) -> tuple[str, dict[str, list[Made]]]:
    """The unit of lengths, and each prompt's answers in their order."""
    check_scored(answers, scores, name)
    missing = len(answers.keys() - scores.keys())
    if missing:
        raise UserError(
            f"scores {name}: run the same widemargin score again; {missing:,} answers have none"
        )
    counted = all(answer["tokens"] is not None for answer in answers.values())
    made: dict[str, list[Made]] = {key: [] for key in prompts}
    for key, answer in answers.items():
        length = answer["tokens"] if counted else len(answer["output"])
        made[answer["prompt_id"]].append(Made(answer, scores[key]["score"], length))
    if len(set(map(len, made.values()))) > 1:
        raise UserError(
            "answers: run the same widemargin generate again to finish them; some prompts have "
            "fewer than others"
        )
    return "tokens" if counted else "characters", made


def _name_of_scores(folder: Path, asked: str | None) -> str:
    """The scores asked for, or the only ones; empty ones, of a scorer that failed, do not count."""
    files = {path.stem.removeprefix("scores-"): path for path in folder.glob("scores-*.jsonl")}
    if asked in files:
        return asked
    names = sorted(name for name in files if files[name].stat().st_size) or sorted(files)
    if len(names) != 1 or asked is not None:
        raise UserError(
            f"--scores: name one of {', '.join(names)}"
            if names
            else f"{folder}: run widemargin score {folder} --by ... first; it has no scores"
        )
    return names[0]


def _check_tokenizer(model: str, settled: Record) -> None:
    if "tokenizer" not in settled:
        raise UserError("--tokens-for: leave it out; a server wrote these answers, as text alone")
    if tokenizer_digest(read_tokenizer(LoadSettings(), model)) != settled["tokenizer"]:
        raise UserError(
            f"--tokens-for: leave it out to write text; the tokenizer of {model} is not that of "
            f"{settled['model_name_or_path']}, which wrote these answers"
        )


def _report(
    made: dict[str, list[Made]], pairs: dict[str, list[Chosen]], dropped: dict[str, str], rows: int
) -> Record:
    lengths = np.array([[a.length, b.length] for chosen in pairs.values() for a, b in chosen])
    scored = [[it for it in several if it.score is not None] for several in made.values()]
    values = [
        np.array([[it.score, it.length] for it in several], float) for several in scored if several
    ]
    within = np.concatenate([one - one.mean(0) for one in values])
    overall = np.concatenate(values)
    return {
        "prompts": len(made),
        "prompts_kept": len(pairs),
        "rows": rows,
        "pairs": len(lengths),
        "dropped_by_reason": dict(Counter(dropped.values()).most_common()),
        "mean_length": dict(zip(SIDES, lengths.mean(0).tolist(), strict=True)),
        "chosen_longer": float((lengths[:, 0] > lengths[:, 1]).mean()),
        "rejected_longer": float((lengths[:, 0] < lengths[:, 1]).mean()),
        "correlation_of_score_and_length": {
            "of all answers": correlation(overall[:, 0], overall[:, 1]),
            "within prompts": correlation(within[:, 0], within[:, 1]),
        },
        "dropped": dropped,
    }


def _counts(dropped: dict[str, str]) -> str:
    counts = Counter(dropped.values()).most_common()
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts)


def _lines(report: Record) -> list[str]:
    head = (
        f"{report['pairs']:,} pairs of {report['prompts_kept']:,} of {report['prompts']:,} prompts"
    )
    reasons = [(f"  {why}", count) for why, count in report["dropped_by_reason"].items()]
    unit = report["length_unit"]
    lengths = [(f"  {side}", value) for side, value in report["mean_length"].items()]
    linked = report["correlation_of_score_and_length"]
    rows = [
        *([("prompts left out, by reason", ""), *reasons] if reasons else []),
        (f"mean length in {unit}", ""),
        *lengths,
        ("share of pairs with chosen longer", report["chosen_longer"]),
        ("share of pairs with rejected longer", report["rejected_longer"]),
        ("correlation of score and length", ""),
        *((f"  {which}", value) for which, value in linked.items()),
    ]
    return [table((head, ""), rows)]
