"""TRL's trainers with this project's head, by one line:

    with use_widemargin_head():
        DPOTrainer(...).train()

DPO, KTO, SFT, GRPO and RLOO trainers all score tokens by one ``autograd.Function`` of TRL's. Here
is one with the same arguments; TRL itself and the trainers stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import BACKENDS, Backend, choose_backend
from ..kernels.linear_logprob import TRAINING_TAIL_EPS, Tail
from ..kernels.linear_logprob.function import at_temperature, check_settings, compute_dtype
from ..kernels.linear_logprob.operators import backward_op, check_entropy_grad, forward_op, kept_of
from ..kernels.linear_logprob.types import Extras
from ..trainer.doctor.trl import COMPACT, GLOBAL, seam
from ..trainer.errors import UserError


@contextlib.contextmanager
def use_widemargin_head(
    *, tail: Tail = "mean", tail_eps: float = TRAINING_TAIL_EPS, backend: Backend = "auto"
) -> Iterator[None]:
    """TRL's trainers score by this head inside; before and after by what they had.

    Trainers made outside use it too: TRL looks its function up at every call. Precomputed
    references alone are computed where the trainer is made.

    Args:
        tail, tail_eps, backend: as `linear_logprob` takes them. A trainer whose loss has an entropy
            bonus needs ``tail="exact"``, and says so otherwise.

    Raises:
        UserError: no TRL, one that calls its head in another way, or an unknown setting.
    """
    utils = seam()
    before = {name: getattr(utils, name) for name in (GLOBAL, COMPACT)}
    enable(tail=tail, tail_eps=tail_eps, backend=backend)
    try:
        yield
    finally:
        vars(utils).update(before)


def enable(
    *, tail: Tail = "mean", tail_eps: float = TRAINING_TAIL_EPS, backend: Backend = "auto"
) -> None:
    """`use_widemargin_head` until `disable`; once more replaces the settings."""
    utils = seam()
    try:
        check_settings(tail=tail, tail_eps=tail_eps)
    except ValueError as error:
        raise UserError(str(error)) from None
    if backend not in BACKENDS:
        raise UserError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    disable()
    setattr(utils, GLOBAL, _function(utils, tail, tail_eps, backend))
    theirs = getattr(utils, COMPACT)

    def compact(device: torch.device) -> bool:
        """TRL scores prompts and padding too on a CPU, as some devices compile for every size."""
        return device.type == "cpu" or theirs(device)

    compact.replaces = theirs  # pyright: ignore[reportFunctionMemberAccess]
    setattr(utils, COMPACT, compact)


def disable() -> None:
    """Give TRL its own head back; nothing where it has it."""
    utils = seam()
    for name in (GLOBAL, COMPACT):
        now = getattr(utils, name)
        setattr(utils, name, getattr(now, "replaces", now))


def _function(utils: Any, tail: Tail, tail_eps: float, backend: Backend) -> Any:
    """A class to stand in place of that which TRL's module has."""

    class WidemarginLogProbFunction(torch.autograd.Function):
        replaces = getattr(utils, GLOBAL)

        @staticmethod
        def forward(
            ctx: Any,
            hidden: Tensor,  # [N, H]
            weight: Tensor,  # [V, H]
            bias: Tensor | None,  # [V]
            targets: Tensor,  # [N]
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = Extras._fields,
        ) -> tuple[Tensor | None, ...]:
            """Log-probs, and of `Extras` those that ``outputs`` names."""
            ctx.set_materialize_grads(False)
            asked = [name in outputs for name in Extras._fields]
            dtype = compute_dtype(hidden)
            scales = at_temperature(temperature, logit_scale, final_logit_softcapping)
            ctx.settings = *scales, tail, tail_eps, dtype, choose_backend(backend, hidden, dtype)
            ctx.needs = list(ctx.needs_input_grad[:3])
            inputs = (hidden, weight, targets, bias)
            found = forward_op(*inputs, None, *ctx.settings, any(ctx.needs), asked)
            ctx.save_for_backward(*inputs, *kept_of(found))
            extras = [x if wanted else None for x, wanted in zip(found[5:], asked, strict=True)]
            ctx.mark_non_differentiable(*(x for x in extras[1:] if x is not None))
            return found[0], *extras

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Under ZeRO-3 the weight is in pieces again by now."""
            grad, entropy_grad = grads[:2]
            check_entropy_grad(entropy_grad, tail)
            hidden, weight, targets, bias, *kept = ctx.saved_tensors
            grad = torch.zeros_like(kept[0]) if grad is None else grad
            with utils.maybe_gather_lm_head_ctx(weight, bias):
                found = backward_op(
                    grad, hidden, weight, targets, bias, None, *kept, entropy_grad,
                    *ctx.settings, ctx.needs,
                )  # fmt: skip
            wanted = [x if need else None for x, need in zip(found, ctx.needs, strict=True)]
            return *wanted, *(None,) * 6

    return WidemarginLogProbFunction
