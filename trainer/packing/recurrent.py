"""Recurrent layers (Mamba, gated delta rules, short convolutions) over packed rows.

A recurrent layer reads a row from left to right, so it would carry one sequence into the next. Its
convolution and its scan are functions of its modeling module, called by name. They are wrapped
here. Where lengths are given (see `varlen`), the inputs are gathered as attention's keys are, into
``[prompt + chosen | prompt + rejected]``. Each sequence is computed for itself, and the outputs at
the row's own positions are taken back. Projections, MLPs and attention run once a prompt token.

torch's functions are called once a sequence. Where transformers calls a package's kernel instead
(causal-conv1d, mamba-ssm, flash-linear-attention), all sequences go into one call with that
kernel's own argument for their boundaries. `kernel_without_boundaries` names a kernel without one.

The wrappers do nothing in generation, padded batches and other models of the family.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RECURRENT = frozenset(("linear_attention", "conv"))
"""Kinds of layers, as a config's ``layer_types`` name them, that take no attention mask."""

MIXED = "hybrid"
"""The kind of a layer with attention and a recurrent part side by side."""


class Timed(NamedTuple):
    """A function of a modeling module that reads its inputs from left to right."""

    axis: int  # of time
    inputs: tuple[int | str, ...]  # the arguments that have this axis
    boundaries: str | None  # the argument by which a package's kernel keeps sequences apart


TIMED = {
    "causal_conv1d_fn": Timed(2, (0, "hidden_states", "x"), "seq_idx"),
    "torch_chunk_gated_delta_rule": Timed(1, (0, 1, 2, "g", "beta"), "cu_seqlens"),
    "chunk_kimi_delta_attention": Timed(
        1, (0, 1, 2, 3, 4, *"qkvg", "query", "key", "value", "beta"), "cu_seqlens"
    ),
    "mamba2_chunk_scan": Timed(1, (0, 1, 3, 4, "z"), "seq_idx"),
    "mamba_selective_scan": Timed(2, (0, 1, 3, 4, *"BCz"), None),
}
"""By name."""

FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions of several steps at once; where they return None the mixer takes the steps singly."""

BOUNDARIES = ("cu_seqlens", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "kv_index")
"""Arguments of a row's own sequences, which are not those of the gathered inputs."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a packed row lie."""

    lengths: Tensor  # [S + 1], what ``queries`` was read from
    queries: list[int]  # outputs of each sequence
    keys: list[int]  # inputs of each sequence
    index: Tensor | None  # [K] the tokens that are the inputs; None where they are the row's own
    cu_seqlens: Tensor  # [S + 1] int64, where the inputs of each sequence begin

    @cached_property
    def seq_idx(self) -> Tensor:
        """[1, K] int32: the sequence of each input."""
        numbers = torch.arange(len(self.keys), dtype=torch.int32, device=self.lengths.device)
        counts = self.cu_seqlens.diff()
        return numbers.repeat_interleave(counts, output_size=sum(self.keys))[None]

    @cached_property
    def own(self) -> Tensor | None:
        """[T] the outputs that are the row's own, which are the last of each sequence."""
        if self.index is None:
            return None
        earlier = self.cu_seqlens[1:] - self.lengths[1:]  # outputs before, that are not
        outputs = sum(self.queries)
        begin = torch.arange(outputs, device=earlier.device)
        return begin + earlier.repeat_interleave(self.lengths.diff(), output_size=outputs)


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
    begins = kwargs["cu_seq_lens_k"].long()
    return Sequences(lengths, queries, keys, kwargs.get("kv_index"), begins)


def kernel_without_boundaries(config: Any) -> str | None:
    """A package's kernel that this family's layers call, and that takes no boundaries; or None."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    known = name.startswith("transformers.models.")
    module = importlib.import_module(name) if known else sys.modules.get(name)
    for function, timed in TIMED.items():
        kernel = _kernel(getattr(module, function, None))
        if kernel is not None and not _takes(kernel, timed.boundaries):
            return f"{kernel.__module__}.{kernel.__name__}"
    return None


def _kernel(function: Any) -> Callable[..., Any] | None:
    """The package's function that transformers calls in place of torch's; None where it does not.

    transformers keeps it in a closure. Where a release keeps it elsewhere, the function counts as
    torch's, and is called once a sequence, which is right for kernels too.
    """
    function = getattr(function, "by_sequence", function)
    if isinstance(function, nn.Module):  # the package `kernels` makes one of a function
        function = _closure(type(function).forward).get("func")
    found = _closure(function).get("implementation")
    return None if found is None or found is inspect.unwrap(function) else found


def _closure(function: Any) -> dict[str, Any]:
    if not inspect.isfunction(function):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def _takes(kernel: Callable[..., Any], argument: str | None) -> bool:
    return argument in inspect.signature(kernel).parameters


def _wrap(module: Any, name: str) -> bool:
    """Whether the module has a function of this name, which is wrapped from now on."""
    function = getattr(module, name, None)
    if function is None:
        return False
    if not hasattr(function, "by_sequence"):
        wrapper = _skipped(function) if name in FUSED else _by_sequence(function, TIMED[name])
        wrapper.by_sequence = function  # pyright: ignore[reportFunctionMemberAccess]
        setattr(module, name, wrapper)
    return True


def _skipped(function: Callable[..., Any]) -> Callable[..., Any]:
    def steps_singly(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _current.get() is None else None

    return steps_singly


def _by_sequence(function: Callable[..., Any], timed: Timed) -> Callable[..., Any]:
    """``function`` on each sequence of a packed row, where there are several."""
    kernel, axis = _kernel(function), timed.axis
    boundaries = timed.boundaries if kernel and _takes(kernel, timed.boundaries) else None

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        sequences = _current.get()
        if sequences is None:
            return function(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in BOUNDARIES}
        given = {**dict(enumerate(args)), **kwargs}
        inputs = {
            name: _tokens(value, axis, sequences.index)
            for name, value in given.items()
            if name in timed.inputs and isinstance(value, Tensor)
        }

        def call(changes: dict[Any, Any]) -> Any:
            part = given | changes
            named = {name: value for name, value in part.items() if isinstance(name, str)}
            return function(*(part[n] for n in range(len(args))), **named)

        if boundaries is None:
            outs = [call(piece) for piece in _pieces(inputs, axis, sequences.keys)]
        else:
            outs = [call(inputs | {boundaries: getattr(sequences, boundaries)})]
        several = isinstance(outs[0], tuple)
        outputs = [out[0] if several else out for out in outs]
        if boundaries is None:
            counts = zip(outputs, sequences.queries, sequences.keys, strict=True)
            outputs = [out.narrow(axis, keys - queries, queries) for out, queries, keys in counts]
            own = torch.cat(outputs, axis)
        else:
            own = _tokens(outputs[0], axis, sequences.own)
        return (own, None) if several else own  # training keeps no state

    return wrapper


def _tokens(value: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """These tokens, or all; in memory one after another, as causal-conv1d takes boundaries."""
    value = value.transpose(1, axis)
    value = value.contiguous() if index is None else value.index_select(1, index)
    return value.transpose(1, axis)


def _pieces(inputs: dict[Any, Tensor], axis: int, counts: list[int]) -> list[dict[Any, Tensor]]:
    """The inputs of each sequence. Copies: kernels read 16 bytes at once, which slices break up."""
    split = {name: value.split(counts, axis) for name, value in inputs.items()}
    return [
        {name: pieces[i].contiguous() for name, pieces in split.items()} for i in range(len(counts))
    ]
