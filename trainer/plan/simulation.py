"""Bytes that one micro-batch holds beyond weights: the model's code runs on tensors without data.

A few layers of the model are built under `FakeTensorMode`: shapes, dtypes and views are real, no
number is computed and no memory is taken. Every tensor that an operation returns counts from then
until nothing refers to it any more, as in torch's allocator; weights and their gradients are left
out. What grows with the layers grows linearly, so two runs with a few layers give the rest.
Operations inside attention's and the head's kernels are not seen: `stand_in` counts them.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...kernels.namespace import NAMESPACE
from ..errors import UserError
from ..model.head import patch_head
from ..settings.config import PreferenceConfig
from .batches import MicroBatch
from .shapes import adapted, build, with_layers
from .stand_in import attention_for, experts, head_backward, head_forward, masks_for

PERIOD = 2
"""Layers after which a model repeats itself: some families alternate two kinds."""


@dataclass(frozen=True)
class Checkpointing:
    """How transformers checkpoints, where it does.

    Args:
        every: one layer of so many is computed again, the others keep their activations.
        offload: the inputs of those that are computed again lie in the host's memory.
    """

    every: int
    offload: bool

    @classmethod
    def of(cls, settings: PreferenceConfig) -> Checkpointing:
        """By ``gradient_checkpointing_kwargs``, whatever the installed transformers calls it."""
        given: dict[str, Any] = {}
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            kwargs = getattr(settings, name, None)
            given |= kwargs if isinstance(kwargs, dict) else {}
        return cls(given.get("every_n_layers", 1), given.get("offload", False))

    def share(self, layers: int) -> float:
        """Of the layers, that are computed again."""
        return math.ceil(layers / self.every) / layers


@dataclass(frozen=True)
class Recipe:
    """How a micro-batch is computed.

    Args:
        config: the model's. dtype: of the weights as they compute. autocast: its dtype, or None.
        attention: the implementation. device: "cuda" or "cpu", where it would run.
    """

    config: Any
    settings: PreferenceConfig
    dtype: torch.dtype
    autocast: torch.dtype | None
    attention: str
    device: str
    checkpointing: Checkpointing | None

    @property
    def compute_bytes(self) -> int:
        return (self.autocast or self.dtype).itemsize


@dataclass(frozen=True)
class Held:
    """Bytes beyond weights and their lasting gradients.

    kept: by the forward for the backward. forward, head, decoder: at the worst moment of the
    forward, of the head's backward and of the layers' backward; the latter two with ``kept`` and
    the gradient of a weight.
    """

    kept: int
    forward: int
    head: int
    decoder: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.head, self.decoder)


def simulate(recipe: Recipe, batch: MicroBatch) -> Held:
    """The bytes that a forward and backward of ``batch`` hold; two short runs stand for all layers.

    Raises:
        UserError: the model cannot be run on tensors without data.
    """
    layers = recipe.config.num_hidden_layers
    period = math.lcm(PERIOD, recipe.checkpointing.every) if recipe.checkpointing else PERIOD
    fewer = period + layers % period  # as many after the last whole period as the model has
    if layers <= fewer + period:
        return _run(recipe, batch, layers)
    short, long = _run(recipe, batch, fewer), _run(recipe, batch, fewer + period)

    def grown(name: str) -> int:
        first, second = getattr(short, name), getattr(long, name)
        return first + (second - first) * (layers - fewer) // period

    return Held(*(grown(name) for name in ("kept", "forward", "head", "decoder")))


def _run(recipe: Recipe, batch: MicroBatch, layers: int) -> Held:
    config = with_layers(recipe.config, layers)
    try:
        with _quiet():
            bare, model = _model(recipe, batch, config)
            with FakeTensorMode(), experts():
                _fill(model, bare, recipe.settings)
                return _forward_and_backward(recipe, batch, bare, model)
    except UserError:
        raise
    except Exception as error:  # of another library's model code, for whatever reason
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"model {config.model_type}: its memory is known only by running it ({reason})"
        ) from error


def _forward_and_backward(recipe: Recipe, batch: MicroBatch, bare: Any, model: Any) -> Held:
    if recipe.checkpointing is not None:
        _checkpoint(bare, recipe.checkpointing)
    model.train()
    watch = _Watch("triton" if recipe.device == "cuda" else "torch", recipe.compute_bytes)
    for tensor in (*model.parameters(), *model.buffers()):
        watch.ignore(tensor)
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_drop_gradient)
    with watch:
        shape = batch.rows, batch.length
        ids, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        select, targets = (torch.zeros(batch.scored, dtype=torch.int64) for _ in range(2))
        masks = masks_for(recipe.attention, batch, bare.config, recipe.dtype, recipe.device)
        amp = torch.autocast("cpu", recipe.autocast) if recipe.autocast else nullcontext()
        with amp:
            out = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks,
                select=select,
                targets=targets,
            )
        watch.phase = "head"
        kept = watch.level
        out.token_logps.sum().backward()
    return Held(kept=kept, **watch.peaks)


def _model(recipe: Recipe, batch: MicroBatch, config: Any) -> tuple[Any, Any]:
    """The patched model and the same in its adapter, on the meta device.

    Made there, as what libraries do to make a model needs no numbers; without `FakeTensorMode`,
    under which ``torch.tensor(scale)`` on that device is of neither kind.
    """
    attention = attention_for(recipe.attention, batch, recipe.device)
    with torch.device("meta"):
        bare = build(config, attention, recipe.dtype)
        patch_head(bare, tail=recipe.settings.head_tail, backend="torch")
        return bare, adapted(bare, recipe.settings)


def _fill(model: Any, bare: Any, settings: PreferenceConfig) -> None:
    """Give the model's weights and buffers the current mode's storage: shapes and no data."""
    head = bare.get_output_embeddings()
    made: dict[int, Tensor] = {}
    for module in model.modules():
        # peft prepares a quantized model by widening what is left in 16 bits.
        widened = (settings.load_in_4bit or settings.load_in_8bit) and (
            not isinstance(module, torch.nn.Linear) or module is head
        )
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    floats = tensor.is_floating_point()
                    new: Tensor = torch.empty(
                        tensor.shape,
                        dtype=torch.float32 if widened and floats else tensor.dtype,
                        device="cpu",
                    )
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]


def _checkpoint(model: Any, options: Checkpointing) -> None:
    """As transformers does it; what lies in the host's memory is no tensor until it is back."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    every = {} if options.every == 1 else {"every_n_layers": options.every}
    enable({"use_reentrant": False, "preserve_rng_state": False}, **every)
    if options.offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _offloading(
                    module._gradient_checkpointing_func
                )


def _offloading(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def leave(x: Tensor) -> tuple[Any, ...]:
        return x.shape, x.dtype, x.device

    def bring_back(left: tuple[Any, ...]) -> Tensor:
        shape, dtype, device = left
        return torch.empty(shape, dtype=dtype, device=device)

    def offloading(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(leave, bring_back):
            return checkpoint(*args, **kwargs)

    return offloading


def _drop_gradient(parameter: Tensor) -> None:
    """The lasting gradient is counted elsewhere; what backward hands over is gone with it."""
    parameter.grad = None


class _Watch(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed."""

    def __init__(self, backend: str, compute_bytes: int) -> None:
        super().__init__()
        self.level = 0
        self.peaks = {"forward": 0, "head": 0, "decoder": 0}
        self.phase = "forward"
        self.backend, self.compute_bytes = backend, compute_bytes
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensor: Tensor) -> None:
        self._seen.add(tensor.untyped_storage())

    def _free(self, size: int) -> None:
        self.level -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        forward = name == f"{NAMESPACE}::linear_logprob"
        backward = name == f"{NAMESPACE}::linear_logprob_backward"
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.level += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        inside = 0
        if forward or backward:
            hidden, weight = args[1:3] if backward else args[:2]
            held = head_backward if backward else head_forward
            vocab, width = weight.shape
            inside = held(len(hidden), width, vocab, self.compute_bytes, self.backend)
        # Autograd adds up gradients in place, but not those of tensors without data: what is alive
        # after such a sum counts with the next operation.
        if name != "aten::add":
            self.peaks[self.phase] = max(self.peaks[self.phase], self.level + inside)
        if backward:
            self.phase = "decoder"
        return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without libraries' warnings, which are about a model that is never trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
