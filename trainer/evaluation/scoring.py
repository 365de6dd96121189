"""Log-probs of every pair's completions, through the head without logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels.margin_loss.function import sequence_logps
from ..data import model_inputs
from ..model.head import check_head, patch_head
from ..packing.verify import settle_packing
from .models import dtype_of
from .settings import PairSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.lengths import PairLengths
    from ..data.table import PairRows


@dataclass
class PairLogps:
    """Summed log-probs of each pair's completions, [pairs] float64, in nats."""

    chosen: np.ndarray
    rejected: np.ndarray


def score_pairs(
    model: PreTrainedModel, rows: PairRows, settings: PairSettings, pad_token_id: int
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
        settings.packing,
        model,
        device=model.device,
        dtype=getattr(torch, dtype_of(settings)),
        lengths=rows.lengths,
        pairs_per_batch=usual_pairs(rows.lengths, settings.max_tokens_per_batch),
        max_tokens=settings.max_tokens_per_batch,
    )
    collator = packing.collator(pad_token_id)
    sums = np.zeros((2, len(rows)))
    indices, found = [], []
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
            found.append(totals.view(2, -1))
            bar.update(len(batch))
    sums[:, np.concatenate(indices)] = torch.cat(found, dim=1).double().cpu().numpy()
    return PairLogps(*sums)


def usual_pairs(lengths: PairLengths, max_tokens: int) -> int:
    """Pairs of a batch that `pair_batches` makes of pairs of average length."""
    widths = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    mean = float(widths.mean()) if len(widths) else 0.0
    return max(1, min(len(widths), int(max_tokens // (2 * max(mean, 1.0)))))


def pair_batches(lengths: PairLengths, max_tokens: int) -> Iterator[list[int]]:
    """Indices of pairs, the longest first, of at most ``max_tokens`` when padded; never none."""
    widths = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    order = np.lexsort((np.arange(len(widths)), -widths)).tolist()
    start = 0
    while start < len(order):
        size = max(1, max_tokens // (2 * int(widths[order[start]])))
        yield order[start : start + size]
        start += size
