"""`widemargin evaluate pairs`: rewards on a preference set, without a judge."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import PairData, chat
from ..data.assembling import assemble
from ..data.chat import pad_token
from ..data.mixing import gather
from ..data.report import DataReport
from ..data.table import PairRows
from ..errors import UserError
from ..model.loading import load_model_config, vocabulary_size
from ..versions import versions
from .models import dtype_of, model_settings, read_model, read_tokenizer
from .output import count, output_folder, table, write_json, write_jsonl
from .pair_metrics import LENGTH_GROUPS, measure, pair_margins
from .scoring import PairLogps, score_pairs
from .settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate_pairs(
    model: str,
    settings: PairSettings,
    betas: dict[str, float],
    *,
    reference: str | None = None,
    max_pairs: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a preference set with ``model``; print a table, write ``pairs.json`` and ``.jsonl``.

    The set is the evaluation split of ``settings`` where they have one, else all there is. Pairs
    keep the order of their file and are never flipped.

    Args:
        model, reference: folders or hub names; the reference is the frozen model of DPO.
        betas: by kind of reward, for the probabilities.
        max_pairs: of the first rows; None for all.
        out: folder to write to; `output_folder`'s if None.
    """
    if max_pairs is not None:
        count("--max-pairs", max_pairs)
        settings.max_eval_samples = max_pairs
    folder = output_folder(model, "pairs", out)
    tokenizer = read_tokenizer(settings, model)
    data = read_pairs(settings, tokenizer, _vocabulary(settings, model))
    print("\n".join(data.report.lines()), flush=True)
    rows = PairRows(data.evaluation)
    logps = _scored(model, settings, rows, tokenizer)
    reference_logps = None
    if reference is not None:
        own, other = _vocabulary(settings, model), _vocabulary(settings, reference)
        if own != other:
            raise UserError(
                f"--reference {reference}: its vocabulary has {other} tokens, the model's {own}; "
                "give a reference with the model's own tokenizer"
            )
        reference_logps = _scored(reference, settings, rows, tokenizer)
    result: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "dtype": dtype_of(settings),
        "data": data.report.as_dict(),
        **measure(logps, rows.lengths, reference_logps, betas),
        "versions": versions(),
    }
    path = write_json(folder / "pairs.json", result)
    each = write_jsonl(folder / "pairs.jsonl", _pair_rows(rows, logps, reference_logps))
    print("\n".join(["", *result_lines(result), "", f"Written: {path}", f"Written: {each}"]))
    return result


def read_pairs(
    settings: PairSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> PairData:
    """The pairs to score, tokenized as for training, in the order of their files."""
    report = DataReport()
    training, evaluation = gather(settings, report.notes)
    parts = evaluation or training
    if not parts:
        raise UserError("no data: set --dataset to a file, a folder or a hub name")
    report.notes = []  # they speak of training
    if settings.chat_template is not None:
        tokenizer.chat_template = chat.read_chat_template(settings.chat_template)
    rows, report.evaluation = assemble(
        parts, tokenizer, settings, training=False, shuffle=False, vocab_size=vocab_size
    )
    return PairData(None, rows, report)


def _vocabulary(settings: PairSettings, model: str) -> int:
    return load_model_config(model_settings(settings, model)).get_text_config().vocab_size


def _scored(
    name: str, settings: PairSettings, rows: PairRows, tokenizer: PreTrainedTokenizerBase
) -> PairLogps:
    model = read_model(settings, name)
    assert vocabulary_size(model) > 0
    scored = score_pairs(model, rows, settings, pad_token(tokenizer))
    del model  # makes room for the reference
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    bad = int((~np.isfinite(scored.chosen + scored.rejected)).sum())
    if bad:
        raise UserError(
            f"model {name}: the log-probs of {bad:,} of {len(rows):,} pairs are not finite; try "
            "--dtype=float32"
        )
    return scored


def _pair_rows(rows: PairRows, logps: PairLogps, reference: PairLogps | None) -> Any:
    """One line a pair, numbered as in the set (rows that were skipped aside)."""
    lengths = rows.lengths
    margins = pair_margins(logps, lengths, reference)
    for i in range(len(rows)):
        yield {
            "pair": i,
            "prompt_tokens": int(lengths.prompt[i]),
            "chosen_tokens": int(lengths.chosen[i]),
            "rejected_tokens": int(lengths.rejected[i]),
            "chosen_sum_logps": float(logps.chosen[i]),
            "rejected_sum_logps": float(logps.rejected[i]),
            **(
                {}
                if reference is None
                else {
                    "reference_chosen_logps": float(reference.chosen[i]),
                    "reference_rejected_logps": float(reference.rejected[i]),
                }
            ),
            **{f"margin_{kind}": float(values[i]) for kind, values in margins.items()},
        }


def result_lines(result: dict[str, Any]) -> list[str]:
    """The tables for the terminal."""
    rewards = result["rewards"]
    kinds = list(rewards)

    def row(label: str, *path: str) -> list[Any]:
        values = []
        for kind in kinds:
            value = rewards[kind]
            for step in path:
                value = value[step]
            values.append(value)
        return [label, *values]

    rows = [
        row("accuracy", "accuracy"),
        row("  standard error", "accuracy_standard_error"),
        *(
            row(
                f"  {name.replace('_', ' ')} ({rewards[kinds[0]]['by_length'][name]['pairs']:,})",
                *("by_length", name, "accuracy"),
            )
            for name in LENGTH_GROUPS
        ),
        row("margin, mean", "margin", "mean"),
        *(row(f"  {q} quantile", "margin", "quantiles", q) for q in ("0.05", "0.5", "0.95")),
        row("correlation with length", "correlation_with_length"),
        row("beta", "beta"),
        row("calibration error", "calibration", "ece"),
        row("log loss", "calibration", "log_loss"),
    ]
    sides = [
        (
            label,
            *(result[key][side] for side in ("chosen", "rejected")),
        )
        for label, key in (
            ("tokens", "tokens"),
            ("mean logp", "mean_logps"),
            ("sum logp", "sum_logps"),
        )
    ]
    return [
        table([f"{result['pairs']:,} pairs", *(kind.replace("_", " ") for kind in kinds)], rows),
        "",
        table(["", "chosen", "rejected"], sides),
        "",
        _calibration_table(rewards),
    ]


def _calibration_table(rewards: dict[str, Any]) -> str:
    """Bins of probability with pairs in them, for the first kind of reward."""
    kind, metrics = next(iter(rewards.items()))
    rows = [
        (f"{b['from']:.2f} to {b['to']:.2f}", b["pairs"], b["probability"], b["accuracy"])
        for b in metrics["calibration"]["bins"]
        if b["pairs"]
    ]
    head = (f"probability ({kind.replace('_', ' ')})", "pairs", "mean", "accuracy")
    return table(head, rows)
