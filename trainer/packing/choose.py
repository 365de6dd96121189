"""Layouts worth trying for a model, the fastest first, each with its reason.

The attention implementation, the family and the lengths decide. `verify` then compares a candidate
with padded batches on the model itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import UserError
from ..parallel.groups import Place
from ..settings.names import Layout
from .collator import PairCollator
from .layout import BLOCK, Rows, dense_cost, row_length
from .recurrent import MIXED, RECURRENT, has_no_attention, is_recurrent, kernel_without_boundaries
from .varlen import knows_windows

if TYPE_CHECKING:
    from ..data.images.processor import Family
    from ..data.table import PairLengths, PairRows

FAMILIES = frozenset(
    (
        *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
        *("gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite", "cohere2", "smollm3"),
    )
)
"""Model types whose packed rows are tested to be exact, sliding windows included."""

LAYER_TYPES = {"full_attention", "sliding_attention", *RECURRENT, MIXED, "mlp", "moe"}
"""Kinds of layers that are known here; the last two see one token at a time."""

WIDEST_HEAD = 256
"""Features of the widest attention head that flash attention takes."""

SAMPLED_BATCHES = 32


@dataclass(frozen=True)
class Packing:
    """A layout for batches, see `PairCollator`, and the reason for it."""

    layout: Layout
    rows: Rows
    reason: str
    area_cost: float = 0.0
    shortest_row: int = BLOCK
    place: Place | None = None  # among the ranks that share each row

    def collator(self, pad_token_id: int) -> PairCollator:
        return PairCollator(
            pad_token_id,
            layout=self.layout,
            rows=self.rows,
            area_cost=self.area_cost,
            shortest_row=self.shortest_row,
            place=self.place,
        )

    def __str__(self) -> str:
        shared = "" if self.place is None else f", each row over {self.place.size} ranks"
        return f"packing: {self.layout} ({self.reason}){shared}"


def packings(
    setting: str,
    config: Any,
    *,
    attention: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lengths: PairLengths | None = None,
    pairs_per_batch: int = 1,
    max_tokens: int | None = None,
    checked: bool = True,
) -> list[Packing]:
    """Layouts that should be exact for a model, the fastest first; never empty.

    Args:
        setting: of ``packing``, one of `PACKINGS`.
        config: the model's.
        attention: implementation; the config's own if None.
        device, dtype: where and in what dtype the model computes.
        lengths: of the data: what is fastest where masks are dense, and whether windows matter.
        pairs_per_batch: of one micro-batch.
        max_tokens: of one micro-batch, where there is a limit.
        checked: whether `settle_packing` will compare; "auto" otherwise takes tested families only.

    Raises:
        UserError: ``setting`` names a layout that cannot be exact, or cannot run.
    """
    text = config.get_text_config()
    attention = str(attention or text._attn_implementation or "sdpa")
    if setting == "padded":
        return [Packing("padded", "dense", "as configured")]
    kinds, why = _rows(text, attention, torch.device(device), dtype)
    obstacle = _obstacle(text, lengths, checked or setting != "auto") or (None if kinds else why)
    if obstacle is not None:
        if setting == "auto":
            return [Packing("padded", "dense", obstacle)]
        raise UserError(
            f"packing: {setting} cannot be used here: {obstacle}; set packing: padded, or auto"
        )
    cost = area_cost(text)
    shortest = _shortest(lengths, pairs_per_batch, max_tokens)
    layouts: tuple[Any, ...] = ("prefix_shared", "packed") if setting == "auto" else (setting,)
    candidates = [
        Packing(layout, rows, why, area_cost=cost, shortest_row=shortest)
        for rows in kinds
        for layout in layouts
    ]
    if setting == "auto":
        candidates.append(Packing("padded", "dense", "the fewest operations for these lengths"))
        if kinds[0] == "dense" and lengths is not None and len(lengths):
            costs = dense_costs(lengths, pairs_per_batch, cost)
            candidates.sort(key=lambda packing: costs[packing.layout])
    return candidates


def choose_packing(setting: str, config: Any, **circumstances: Any) -> Packing:
    """The first of `packings`, with the same arguments and errors."""
    return packings(setting, config, **circumstances)[0]


def packing_of_images(family: Family, config: Any, setting: str) -> Packing | None:
    """The packing of prompts with images where there is no choice; None where there is.

    Raises:
        UserError: the model is of another family, or ``setting`` not one that it can have.
    """
    kind = config.model_type
    if kind != family.model:
        raise UserError(
            f"images: give the model's own processor; the model is of the kind {kind}, the "
            f"processor for {family.model}"
        )
    if not family.sees_ahead:
        return None
    reason = f"tokens of an image see later ones in {kind}"
    if setting not in ("auto", "padded"):
        raise UserError(f"packing: set padded, or auto; {reason}")
    return Packing("padded", "dense", reason)


def area_cost(config: Any) -> float:
    """Cost of one entry of a dense attention mask, in tokens through the decoder.

    An entry takes 4 operations per feature of the attention heads (scores and values), a token 2
    per weight of a layer; of a mixture of experts, per weight that is active.
    """
    hidden, heads = _most(config, "hidden_size"), _most(config, "num_attention_heads")
    if not hidden or not heads:  # no attention, so no mask
        return 0.0
    head = _most(config, "head_dim") or hidden // heads
    shared = _most(config, "num_key_value_heads") or heads
    inner = _most(config, "intermediate_size") or 4 * hidden
    experts = _most(config, "num_experts_per_tok")
    if experts:
        inner = experts * (_most(config, "moe_intermediate_size") or inner)
    weights = 2 * hidden * head * (heads + shared) + 3 * hidden * inner
    return 2 * heads * head / weights


def _most(config: Any, name: str) -> int:
    """A number of the config, the largest of those it has a layer; 0 where it has none."""
    try:
        value = getattr(config, name, None) or 0
    except Exception:  # transformers' own for a number that layers do not share
        value = [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    return max(value) if isinstance(value, list | tuple) else value


def dense_costs(lengths: PairLengths, pairs: int, area: float) -> dict[str, float]:
    """Tokens that each layout's micro-batches cost with dense masks, summed over a sample."""
    batches = max(1, min(SAMPLED_BATCHES, len(lengths) // pairs))
    trees = int(lengths.tree.max()) + 1
    count = min(trees, -(-batches * pairs * trees // len(lengths)))
    sampled = np.isin(lengths.tree, np.linspace(0, trees - 1, count).astype(int))
    rows = np.flatnonzero(sampled)
    rows = rows[np.argsort(lengths.tree[rows], kind="stable")]
    costs = {"prefix_shared": 0.0, "packed": 0.0, "padded": 0.0}
    for begin in range(0, len(rows), pairs):
        batch = rows[begin : begin + pairs]
        sequences = lengths.unfold(batch, np.zeros_like(batch))
        longest = int(sequences.totals.max())
        costs["padded"] += len(sequences.totals) * longest * (1 + area * longest)
        costs["packed"] += dense_cost(sequences.totals, area)
        costs["prefix_shared"] += dense_cost(sequences.tree_tokens, area)
    return costs


def _rows(
    config: Any, attention: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[Rows], str]:
    """Kinds of rows that this attention reads, the fastest first, and why these (or none)."""
    kernel = kernel_without_boundaries(config) if is_recurrent(config) else None
    if kernel is not None:
        return [], f"{config.model_type}'s kernel {kernel} cannot keep sequences of a row apart"
    if has_no_attention(config):
        return ["varlen"], "recurrent layers: sequence by sequence, without padding"
    if is_recurrent(config):
        kinds, why = _rows_of_attention(config, attention, device, dtype)
        varlen: list[Rows] = [kind for kind in kinds if kind == "varlen"]
        other = f"{config.model_type} has recurrent layers, which take no dense masks ({why})"
        return varlen, why if varlen else other
    return _rows_of_attention(config, attention, device, dtype)


def _rows_of_attention(
    config: Any, attention: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[Rows], str]:
    if "flash" in attention:
        return ["varlen"], f"{attention}: rows without padding"
    if attention == "flex_attention":
        if device.type == "cpu":
            return [], "flex_attention has no backward on a CPU; attn_implementation: sdpa has"
        return ["blocks"], f"{attention}: one row of few lengths"
    if attention == "eager":
        return ["dense"], f"{attention}: dense masks"
    if attention != "sdpa":
        return [], f"attention {attention} is not known here"
    if device.type == "cpu":
        return ["varlen", "dense"], "sdpa on a CPU: sequence by sequence, without padding"
    heads = _most(config, "hidden_size") // (_most(config, "num_attention_heads") or 1)
    if (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and _runs_varlen(device)
        and (_most(config, "head_dim") or heads) <= WIDEST_HEAD
        and getattr(config, "attn_logit_softcapping", None) is None
    ):
        return ["varlen", "dense"], "torch's varlen attention: rows without padding"
    return ["dense"], f"sdpa in {str(dtype).removeprefix('torch.')}: dense masks"


def _runs_varlen(device: torch.device) -> bool:
    """Whether torch's varlen attention is there, knows windows, and has kernels for this GPU."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or not knows_windows():
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _obstacle(config: Any, lengths: PairLengths | None, unknown_too: bool) -> str | None:
    """Why rows of several sequences could differ from each alone, as far as the config tells."""
    kind = config.model_type
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional not in (None, False, "vision") or not getattr(config, "is_causal", True):
        return f"{kind} attends to later tokens"
    if others := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        return f"{kind} has layers of kind {', '.join(sorted(others))}"
    if kind in FAMILIES:
        return None
    if not unknown_too:
        return f"{kind} is not among the tested families, and sharded weights cannot be compared"
    window = getattr(config, "sliding_window", None)
    if window is not None and (lengths is None or longest_sequence(lengths) > window):
        return f"{kind} is not among the tested families, and has a sliding window of {window}"
    return None


def longest_sequence(*lengths: PairLengths | None) -> int:
    """Tokens of the longest prompt and completion; 0 where there are none, or nobody knows."""
    known = [part for part in lengths if part is not None and len(part)]
    longest = [(p.prompt + np.maximum(p.chosen, p.rejected)).max() for p in known]
    return int(max(longest, default=0))


def longest_row(parts: Sequence[PairRows | None], exchanged: bool) -> int:
    """The same of data sets; with answers ``exchanged``, also after other prompts."""
    known = [part for part in parts if part is not None]
    longest = longest_sequence(*(part.lengths for part in known))
    longest = max([longest, *(part.longest_to_come for part in known)])
    return max([longest, *(part.longest_exchanged for part in known)]) if exchanged else longest


def _shortest(lengths: PairLengths | None, pairs: int, max_tokens: int | None) -> int:
    """A row length below which few micro-batches fall, so that there are few lengths in all.

    Shorter rows are padded to it, so it is none that a limit on tokens keeps them from reaching.
    """
    if lengths is None or not len(lengths):
        return BLOCK
    every = np.arange(len(lengths))
    total = lengths.computed("prefix_shared", every, np.zeros_like(every), 1)[0]
    usual = row_length(int(total / len(lengths) * pairs / 2))
    return usual if max_tokens is None else min(usual, row_length(max_tokens))
