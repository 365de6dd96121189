"""Recurrent layers (Mamba, gated delta rules, short convolutions) over packed rows.

A recurrent layer reads a row from left to right, so it would carry one sequence into the next. Its
convolution and its scan are functions of its modeling module, called by name. They are wrapped
here. Where lengths are given (see `varlen`), the inputs are gathered as attention's keys are, into
``[prompt + chosen | prompt + rejected]``. Each sequence is computed for itself, and the outputs at
the row's own positions are taken back. Projections, MLPs and attention run once a prompt token.

The wrappers do nothing in generation, padded batches and other models of the family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RECURRENT = frozenset(("linear_attention", "conv"))
"""Kinds of layers, as a config's ``layer_types`` name them, that take no attention mask."""

MIXED = "hybrid"
"""The kind of a layer with attention and a recurrent part side by side."""

TIMED: dict[str, tuple[int, tuple[int | str, ...]]] = {
    "causal_conv1d_fn": (2, (0, "hidden_states", "x")),
    "torch_chunk_gated_delta_rule": (1, (0, 1, 2, "g", "beta")),
    "chunk_kimi_delta_attention": (1, (0, 1, 2, 3, 4, *"qkvg", "query", "key", "value", "beta")),
    "mamba2_chunk_scan": (1, (0, 1, 3, 4, "z")),
    "mamba_selective_scan": (2, (0, 1, 3, 4, *"BCz")),
}
"""By function: the axis of time, and the arguments that have it."""

FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions of several steps at once; where they return None the mixer takes the steps singly."""

BOUNDARIES = ("cu_seqlens", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "kv_index")
"""Arguments by which a function would tell sequences apart by itself: here a call has only one."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a packed row lie."""

    lengths: Tensor  # [S + 1], what ``queries`` was read from
    queries: list[int]  # outputs of each sequence
    keys: list[int]  # inputs of each sequence
    index: Tensor | None  # [K] the tokens that are the inputs; None where they are the row's own


class _Held:
    """The sequences of a decoder's last forward, for mixers whose layers hand on no arguments."""

    sequences: Sequences | None = None


_current: ContextVar[Sequences | None] = ContextVar("sequences", default=None)


def is_recurrent(config: Any) -> bool:
    """Whether some layers of a text model are recurrent."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds & {*RECURRENT, MIXED}) or has_no_attention(config)


def has_no_attention(config: Any) -> bool:
    """Whether all layers of a text model are recurrent."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= RECURRENT if kinds else not getattr(config, "num_attention_heads", 0)


def keep_sequences_apart(model: Any) -> None:
    """Wrap what a model's recurrent layers call, once; models without such layers stay as they are.

    The functions belong to the modeling module, so all models of the family share the wrappers.
    """
    if hasattr(model, "keeps_sequences_apart"):
        return
    model.keeps_sequences_apart = True
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    wrapped = {m.__name__ for m in modules if sum(_wrap(m, name) for name in (*TIMED, *FUSED))}
    held = _Held()
    for part in model.modules():
        convolves = any(isinstance(child, nn.Conv1d) for child in part.children())
        if convolves and type(part).__module__ in wrapped:
            part.sequences_held = held
            part.register_forward_pre_hook(_enter, with_kwargs=True)
            part.register_forward_hook(_leave, always_call=True)
    decoder = model.get_decoder()
    decoder.sequences_held = held
    decoder.register_forward_pre_hook(_hold, with_kwargs=True)


def _hold(decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
    decoder.sequences_held.sequences = _sequences(kwargs, decoder.sequences_held.sequences)


def _enter(mixer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    held = mixer.sequences_held.sequences
    given = kwargs.get("cu_seq_lens_q") is not None
    _current.set(_sequences(kwargs, held) if given else held)


def _leave(*_: Any) -> None:
    _current.set(None)


def _sequences(kwargs: dict[str, Any], known: Sequences | None) -> Sequences | None:
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is None:
        return None
    if known is not None and known.lengths is lengths:  # reading them waits for a GPU
        return known
    queries, keys = torch.stack([lengths, kwargs["cu_seq_lens_k"]]).diff().tolist()
    return Sequences(lengths, queries, keys, kwargs.get("kv_index"))


def _wrap(module: Any, name: str) -> bool:
    """Whether the module has a function of this name, which is wrapped from now on."""
    function = getattr(module, name, None)
    if function is None:
        return False
    if not hasattr(function, "by_sequence"):
        wrapper = _skipped(function) if name in FUSED else _by_sequence(function, *TIMED[name])
        wrapper.by_sequence = True  # pyright: ignore[reportFunctionMemberAccess]
        setattr(module, name, wrapper)
    return True


def _skipped(function: Callable[..., Any]) -> Callable[..., Any]:
    def steps_singly(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _current.get() is None else None

    return steps_singly


def _by_sequence(
    function: Callable[..., Any], axis: int, timed: tuple[int | str, ...]
) -> Callable[..., Any]:
    """``function`` on each sequence of a packed row, where there are several."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        sequences = _current.get()
        if sequences is None:
            return function(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in BOUNDARIES}
        given = {**dict(enumerate(args)), **kwargs}
        pieces = {
            name: _pieces(value, axis, sequences)
            for name, value in given.items()
            if name in timed and isinstance(value, Tensor)
        }
        outputs, several = [], False
        for i, (queries, keys) in enumerate(zip(sequences.queries, sequences.keys, strict=True)):
            part = given | {name: piece[i] for name, piece in pieces.items()}
            out = function(*(part[n] for n in range(len(args))), **{n: part[n] for n in kwargs})
            several = isinstance(out, tuple)
            outputs.append((out[0] if several else out).narrow(axis, keys - queries, queries))
        joined = torch.cat(outputs, axis)
        return (joined, None) if several else joined  # training keeps no state

    return wrapper


def _pieces(value: Tensor, axis: int, sequences: Sequences) -> tuple[Tensor, ...]:
    """The inputs of each sequence."""
    if sequences.index is not None:
        value = value.index_select(axis, sequences.index)
    return value.split(sequences.keys, axis)
