"""`widemargin evaluate pairs`: rewards on a preference set, without a judge."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels.margin_loss.function import sequence_logps
from ..data import PairData
from ..data.chat import pad_token
from ..data.images.processor import ImageProcessor, image_processor
from ..data.pairs import assemble
from ..data.report import DataReport
from ..data.sources import gather
from ..data.table import PairRows, is_single
from ..data.template import with_template
from ..errors import UserError, expect_whole
from ..model.head import patch_head
from ..model.loading import load_model_config, vocabulary_size
from ..model.trial import check_head
from ..monitor.run_record import versions
from ..packing import model_inputs
from ..packing.verify import settle_packing
from .models import dtype_of, model_settings, read_model, read_tokenizer
from .pair_metrics import PairLogps, measure, pair_margins, result_lines
from .results import output_folder, write_json, write_jsonl
from .settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.table import PairLengths


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
        expect_whole("--max-pairs", max_pairs, 1)
        settings.max_eval_samples = max_pairs
    folder = output_folder(model, "pairs", out)
    tokenizer = read_tokenizer(settings, model)
    vocabulary = _vocabulary(settings, model)
    data = read_pairs(settings, tokenizer, vocabulary)
    print("\n".join(data.report.lines()), flush=True)
    rows = PairRows(data.evaluation)
    logps = _scored(model, settings, rows, tokenizer)
    reference_logps = None
    if reference is not None:
        reference_vocabulary = _vocabulary(settings, reference)
        if reference_vocabulary != vocabulary:
            raise UserError(
                f"--reference {reference}: its vocabulary has {reference_vocabulary} tokens, the "
                f"model's {vocabulary}; give a reference with the model's own tokenizer"
            )
        reference_logps = _scored(reference, settings, rows, tokenizer)
    result: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "dtype": dtype_of(settings),
        "data": data.report.as_dict(),
        **measure(logps, rows.scored, reference_logps, betas),
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
    if not parts and (names := ", ".join(settings.mixture())):
        splits = ", ".join(settings.dataset_splits)
        raise UserError(f"--split: leave it out; {names} is one table, without a split {splits}")
    if not parts:
        raise UserError("no data: set --dataset to a file, a folder or a hub name")
    for part in parts:
        if is_single(part.rows):
            raise UserError(
                f"dataset: give pairs (prompt, chosen, rejected); {part.name} has single answers "
                "with labels"
            )
    report.notes = []  # they speak of training
    tokenizer = with_template(tokenizer, settings)
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
    images = image_processor(tokenizer, settings) if rows.has_images else None
    pad = pad_token(tokenizer, vocabulary_size(model))
    logps = score_pairs(model, rows, settings, pad, images)
    del model  # makes room for the reference
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    bad = int((~np.isfinite(logps.chosen + logps.rejected)).sum())
    if bad:
        raise UserError(
            f"model {name}: the log-probs of {bad:,} of {len(rows):,} pairs are not finite; try "
            "--dtype=float32"
        )
    return logps


def score_pairs(
    model: PreTrainedModel,
    rows: PairRows,
    settings: PairSettings,
    pad_token_id: int,
    images: ImageProcessor | None = None,
) -> PairLogps:
    """The model's log-probs of all pairs; ``model`` is patched, see `patch_head`, if it is not yet.

    Batches hold pairs of like length, the longest first (what does not fit in memory shows at
    once), and depend on the lengths and ``max_tokens_per_batch`` alone.
    """
    from tqdm.auto import tqdm

    if not hasattr(model, "scoring"):  # in training it keeps the settings that it is trained with
        patch_head(model)
    check_head(model)
    packing = settle_packing(
        "padded" if images is not None and images.family.sees_ahead else settings.packing,
        model,
        device=model.device,
        dtype=getattr(torch, dtype_of(settings)),
        lengths=rows.lengths,
        pairs_per_batch=usual_pairs(rows.lengths, settings.max_tokens_per_batch),
        max_tokens=settings.max_tokens_per_batch,
    )
    collator = packing.collator(pad_token_id)
    collator.images = images
    sums = np.zeros((2, len(rows)))
    indices, batch_sums = [], []
    with torch.no_grad(), tqdm(total=len(rows), unit="pair", disable=None) as bar:
        for batch in pair_batches(rows.lengths, settings.max_tokens_per_batch):
            inputs: Any = collator(rows.__getitems__(batch))
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            scored = model(**model_inputs(inputs))
            totals, _ = sequence_logps(scored.token_logps, inputs["cu_seqlens"])
            indices.append(batch)
            batch_sums.append(totals.view(2, -1))
            bar.update(len(batch))
    sums[:, np.concatenate(indices)] = torch.cat(batch_sums, dim=1).double().cpu().numpy()
    return PairLogps(*sums)


def usual_pairs(lengths: PairLengths, max_tokens: int) -> int:
    """Pairs of a batch that `pair_batches` makes of pairs of average length."""
    tokens = lengths.alone("padded")
    mean = float(tokens.mean()) if len(tokens) else 0.0
    return max(1, min(len(tokens), int(max_tokens // max(mean, 2.0))))


def pair_batches(lengths: PairLengths, max_tokens: int) -> Iterator[list[int]]:
    """Indices of pairs, the longest first, of at most ``max_tokens`` when padded; never none."""
    tokens = lengths.alone("padded")
    order = np.argsort(-tokens, kind="stable").tolist()
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(tokens[order[start]]))
        yield order[start : start + size]
        start += size


def _pair_rows(
    rows: PairRows, logps: PairLogps, reference: PairLogps | None
) -> Iterator[dict[str, Any]]:
    """One row a pair, numbered as in the set without the rows that were skipped."""
    lengths = rows.scored
    columns: dict[str, np.ndarray] = {
        "prompt_tokens": lengths.prompt,
        "chosen_tokens": lengths.chosen,
        "rejected_tokens": lengths.rejected,
        "chosen_sum_logps": logps.chosen,
        "rejected_sum_logps": logps.rejected,
    }
    if reference is not None:
        columns["reference_chosen_logps"] = reference.chosen
        columns["reference_rejected_logps"] = reference.rejected
    for kind, margins in pair_margins(logps, lengths, reference).items():
        columns[f"margin_{kind}"] = margins
    for i in range(len(rows)):
        yield {"pair": i} | {name: values[i].item() for name, values in columns.items()}
