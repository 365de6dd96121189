"""Scores of the answers in a folder: `scores-NAME.jsonl`, a record an answer."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

from ..errors import UserError
from ..evaluation.results import Record, Records, read_records
from ..files import digest, file_digest
from ..text import printable
from .scorers import TRUNCATED, Scored, ScoreSettings, make_scorer, usable

NO_ANSWER = "no answer"
ANSWERED = "FOLDER: give the one that widemargin generate wrote"


def score_name(by: str) -> str:
    """What scores are called if nothing is said: python-rules-brevity, judge-gpt-4o, ..."""
    kind, _, name = by.partition(":")
    last = Path(name).expanduser().resolve().name if kind == "model" else name
    return re.sub(r"[^\w.-]+", "-", f"{kind}-{last}").strip("-.")


def score(
    folder: Path, by: str, settings: ScoreSettings, *, name: str | None, max_failures: float
) -> dict[str, Record]:
    """Score the answers of ``folder`` that have no score under ``name``.

    Raises:
        UserError: more than the share ``max_failures`` of answers got no score.
    """
    _, prompts = read_records(folder, "prompts", ANSWERED)
    _, answers = read_records(folder, "answers", ANSWERED)
    name = name or score_name(by)
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name: give letters, digits, dots and dashes, got {name!r}")
    scorer = make_scorer(by, settings)
    settled = {"answers": file_digest(folder / "answers.settings.json"), **scorer.identity}
    with Records(folder, f"scores-{name}", settled, "give another --name") as records:
        check_scored(answers, records.done, name)
        if records.done:
            print(f"{len(records.done):,} of {len(answers):,} scores are in {records.path} already")
        said = [key for key in answers if answers[key]["output"].strip()]
        for start in range(0, len(said), settings.batch_size):  # the same batches in every run
            batch = said[start : start + settings.batch_size]
            if not records.done.keys() >= set(batch):
                made = map(usable, scorer.scores([_item(answers[key], prompts) for key in batch]))
                records.append(
                    _record(answers[key], *score) for key, score in zip(batch, made, strict=True)
                )
                _check_failures(records, len(answers), max_failures)
        silent = (it for it in answers.values() if not it["output"].strip())
        records.append(_record(it, None, NO_ANSWER) for it in silent)
        _check_failures(records, len(answers), max_failures)
        _report(records, folder)
        return records.done


def check_scored(answers: dict[str, Record], scores: dict[str, Record], name: str) -> None:
    """Raise ``UserError`` where scores are those of other answers under the same ids."""
    for key in answers.keys() & scores.keys():
        if scores[key]["answer"] != _digest(answers[key]):
            raise UserError(
                f"scores {name}: give score another --name; the answer {key} has changed since"
            )


def _digest(answer: Record) -> str:
    return digest([answer["output"].encode("utf-8", "surrogatepass")], 8)


def _record(answer: Record, score: float | None, why: str) -> Record:
    return {"id": answer["id"], "answer": _digest(answer), "score": score, "why": why}


def _item(answer: Record, prompts: dict[str, Record]) -> Scored:
    prompt = prompts[answer["prompt_id"]]
    return Scored(prompt["prompt"], answer["output"], prompt["row"])


def _failed(records: Records) -> list[Record]:
    made = records.done.values()
    return [record for record in made if record["score"] is None and record["why"] != NO_ANSWER]


def _check_failures(records: Records, total: int, share: float) -> None:
    failed = _failed(records)
    if len(failed) > share * total:
        raise UserError(
            f"--max-failures: correct the scorer and give --name, or raise this from {share:g}; "
            f"{len(failed):,} of {total:,} answers got no score, first {failed[0]['id']}: "
            f"{printable(failed[0]['why'], 200)}"
        )


def _report(records: Records, folder: Path) -> None:
    made = list(records.done.values())
    values = [record["score"] for record in made if record["score"] is not None]
    line = f"{len(values):,} scores"
    if values:
        line += f", from {min(values):.4g} to {max(values):.4g}, median {median(values):.4g}"
    failed, cut = _failed(records), sum(record["why"] == TRUNCATED for record in made)
    empty = len(made) - len(values) - len(failed)
    counts = {"answers without text": empty, "without a score": len(failed), TRUNCATED: cut}
    print("\n".join([line, *(f"  {what}: {n:,}" for what, n in counts.items() if n)]))
    print(f"Written: {records.path}; next: widemargin pair {folder} --out pairs.jsonl")
