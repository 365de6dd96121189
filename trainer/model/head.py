"""The model's head without logits: one line for any trainer.

    patch_head(model)
    out = model(input_ids, attention_mask=mask, select=select, targets=targets)
    out.token_logps                                     # [N], differentiable

Called without ``targets``, the model does what it did (``generate`` included). With them, the
decoder runs, the hidden states at ``select`` are picked, and `linear_logprob` runs *inside the
lm_head module's call*, so that ZeRO-3, FSDP2 and PEFT gather and release its weight as for logits.

Patch the bare model, before PEFT, DDP, FSDP or ZeRO wrap it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils.generic import ModelOutput

from ...kernels.linear_logprob import TRAINING_TAIL_EPS, Backend, HeadStats, Tail, linear_logprob
from ..errors import UserError
from ..packing.masks import packed_arguments
from .experts import balance_loss
from .logits import logit_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ScoredTokens(ModelOutput):
    """What a patched model returns when given targets; N as in ``targets``."""

    token_logps: Tensor | None = None  # [N] fp32, differentiable
    mean_logits: Tensor | None = None  # [N] mean over the vocabulary, before any softcap; detached
    # [3, N] log Σp², entropy in nats, and 1 where the target is likeliest; where `Scoring` asks
    figures: Tensor | None = None
    aux_loss: Tensor | None = None  # [] of a mixture of experts, where router_weights were given


@dataclass
class Scoring:
    """How a patched head scores, read from the model's config; see `linear_logprob`."""

    logit_scale: float
    softcap: float | None
    tail: Tail
    tail_eps: float
    backend: Backend
    stats: HeadStats | None = None
    """Of the last call with gradients; backward fills it."""
    figures: bool = False
    """Whether forward also computes the figures of `ScoredTokens`."""


def patch_head(
    model: PreTrainedModel,
    *,
    tail: Tail = "mean",
    tail_eps: float = TRAINING_TAIL_EPS,
    backend: Backend = "auto",
    figures: bool = False,
) -> Scoring:
    """Teach ``model`` to return log-probs of given tokens; see the module's docstring.

    The model then takes ``select`` [N] int64, flat positions in [batch * length] whose hidden
    states predict, and ``targets`` [N] int64, the tokens they should predict; it returns
    `ScoredTokens`. Rows that pack several sequences, or pairs that share their prompt, come with
    ``position_ids``, ``segment_ids`` and ``branch_ids`` [batch, length] and no attention mask; see
    `PairCollator`, which makes all of these. With ``router_weights`` [batch · length] it also
    returns a mixture's ``aux_loss``, see `model.experts`. Patching twice replaces the settings.

    Raises:
        UserError: an encoder-decoder model, an adapter on the head, or no head at all.
    """
    _check_model(model)
    logits = logit_settings(model.config)
    scoring = Scoring(**logits, tail=tail, tail_eps=tail_eps, backend=backend, figures=figures)
    head: Any = model.get_output_embeddings()
    patched: Any
    for patched, forward in ((head, _head_forward), (model, _model_forward)):
        if not hasattr(patched, "unpatched_forward"):
            patched.unpatched_forward = patched.forward
        patched.scoring = scoring
        patched.forward = _Bound(forward, patched)
    return scoring


class _Bound:
    """A method of one module, which `torch.save` of the module takes, unlike ``MethodType``'s.

    accelerate looks for ``__func__``, to wrap the function and to find it again.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.__func__, self.__self__ = function, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def _model_forward(
    self: Any,
    *args: Any,
    select: Tensor | None = None,
    targets: Tensor | None = None,
    segment_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    router_weights: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if segment_ids is not None or kwargs.get("cu_seq_lens_q") is not None:
        kwargs = packed_arguments(self, kwargs, segment_ids, branch_ids) | {"use_cache": False}
    if targets is None:
        return self.unpatched_forward(*args, **kwargs)
    if select is None:
        raise ValueError("select: expected the positions [N] whose hidden states predict targets")
    if select.dtype not in (torch.int64, torch.int32) or select.dim() != 1:
        raise ValueError(
            "select: expected int64 positions [N] in the flattened batch, got "
            f"{select.dtype} of shape {list(select.shape)}; those of a mask are "
            "mask.flatten().nonzero()[:, 0]"
        )
    kwargs["use_cache"] = False
    if router_weights is not None:
        kwargs["output_router_logits"] = True
    outputs = inner_model(self)(*args, **kwargs)
    hidden = outputs[0]
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, select)
    token_logps, mean_logits, figures = self.get_output_embeddings()(picked, targets=targets)
    aux_loss = None
    router_logits = getattr(outputs, "router_logits", None)  # a family's dense models have none
    if router_weights is not None and router_logits:
        top_k = self.config.get_text_config().num_experts_per_tok
        aux_loss = balance_loss(router_logits, router_weights, top_k)
    return ScoredTokens(token_logps, mean_logits, figures, aux_loss)


# Its operators are opaque to torch.compile anyway, and backward writes into what forward returned
# (the statistics), which a compiled graph cannot have.
@torch.compiler.disable
def _head_forward(self: Any, hidden: Tensor, targets: Tensor | None = None) -> Any:
    if targets is None:
        return self.unpatched_forward(hidden)
    scoring: Scoring = self.scoring
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(self.weight.dtype)
    bias = getattr(self, "bias", None)
    asked = scoring.figures
    token_logps, stats, *figures = linear_logprob(
        hidden,
        self.weight,
        targets,
        bias=bias,
        logit_scale=scoring.logit_scale,
        softcap=scoring.softcap,
        tail=scoring.tail,
        tail_eps=scoring.tail_eps,
        backend=scoring.backend,
        return_stats=True,
        return_entropy=asked,
        return_log_sum_sq_probs=asked,
        return_is_top1=asked,
    )
    if torch.is_grad_enabled():
        scoring.stats = stats
    mean_logits = _mean_logits(hidden, self.weight, bias, scoring.logit_scale)
    if not asked:
        return token_logps, mean_logits, None
    entropy, log_squares, is_top1 = (figure.detach().float() for figure in figures)
    return token_logps, mean_logits, torch.stack([log_squares, entropy, is_top1])


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The mean over the vocabulary of each token's logits, [N]: one dot product with mean(W)."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return scale * (mean if bias is None else mean + bias.float().mean())


def _check_model(model: PreTrainedModel) -> None:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise UserError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}; "
            "patch the bare model, before DDP, FSDP or ZeRO wrap it"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model: expected a decoder-only language model, got the encoder-decoder "
            f"{config.model_type!r}"
        )
    head = _output_embeddings(model)
    if head is None or inner_model(model) is model:
        raise UserError(
            f"model: expected a causal language model with a head, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    if isinstance(getattr(head, "weight", None), DTensor):
        raise UserError(
            "model: load it without tp_plan; the head cannot take a weight that tensor "
            "parallelism has split over ranks"
        )
    if type(head) is not nn.Linear and not hasattr(head, "unpatched_forward"):
        raise UserError(
            f"model: expected a plain linear lm_head, got {type(head).__name__}; leave lm_head out "
            "of the adapter's target_modules and modules_to_save"
        )


def _output_embeddings(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # how some families say that they have none
        return None


def inner_model(model: Any) -> Any:
    """The model without its head: what makes hidden states of tokens, and of images too."""
    base = model.base_model
    return getattr(model, "model", model) if base is model else base  # Llama-4 names another


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the patched head with the model's own logits on a few tokens.

    A family that treats its logits in a way this project does not know is an error here, and not
    a silently different loss. Needs weights that are not split: not under ZeRO-3 or FSDP. The
    logits are compared as they are, and amplified: small ones do not feel a softcap.
    """
    config = model.config.get_text_config()
    tokens = torch.arange(1, 9, device=model.device)[None] % config.vocab_size
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        _check_causal(model, tokens, logits)
        treated, known = _amplified(model, tokens)
        scored = model(
            input_ids=tokens,
            select=torch.arange(tokens.shape[1] - 1, device=tokens.device),
            targets=tokens[0, 1:],
        )
    finally:
        model.train(was_training)
    full = logits.dtype == torch.float32 and not torch.is_autocast_enabled(logits.device.type)
    bound = 1e-3 if full else 0.05
    expected = logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    for found, right in ((scored.token_logps, expected), (known, treated)):
        if found.shape == right.shape:
            worst = (found - right).abs().max().item()
            if worst <= bound * max(1.0, right.abs().max().item()):
                continue
            apart = f"differ from {type(model).__name__}'s own logits by {worst:.3g}"
        else:
            apart = f"are of {found.shape[-1]} tokens, {type(model).__name__}'s own of fewer"
        raise UserError(
            f"model: take another one; log-probs from the head {apart}: this family does something "
            "before or after its head that is not known here"
        )


def _check_causal(model: Any, tokens: Tensor, logits: Tensor) -> None:
    """Raise ``UserError`` where logits [T - 1, V] depend on the tokens that come later."""
    half = tokens.shape[1] // 2
    others = torch.cat([tokens[:, :half], tokens[:, half:].flip(1)], dim=1)
    after = model(input_ids=others, use_cache=False).logits[0, :half]
    apart = (after - logits[:half]).abs().max().item()
    if apart > 0.05 * max(1.0, logits.abs().max().item()):
        raise UserError(
            "model: take one with causal attention (is_decoder: true, or "
            f"use_bidirectional_attention: false in its config); {type(model).__name__} predicts "
            "a token from those after it, so its log-probs say nothing of an answer"
        )


def _amplified(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] that the model makes of ones of about 50, and those that the head would."""
    head, scoring = model.get_output_embeddings(), model.scoring
    raw: list[Tensor] = []

    def amplify(module: Any, args: Any, out: Any) -> Tensor:
        raw.append(50.0 * out / out.float().std().clamp_min(1e-6).to(out.dtype))
        return raw[-1]

    handle = head.register_forward_hook(amplify)
    try:
        treated = model(input_ids=tokens, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    known = scoring.logit_scale * raw[-1].flatten(0, -2).float()
    if scoring.softcap is not None:
        known = scoring.softcap * torch.tanh(known / scoring.softcap)
    return treated, known
