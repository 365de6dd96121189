"""The model's head without logits: one line for any trainer.

    patch_head(model)
    out = model(input_ids, attention_mask=mask, select=select, targets=targets)
    out.token_logps                                     # [N], differentiable

Called without ``targets``, the model does what it did (``generate`` included). With them, the
decoder runs, the hidden states at ``select`` are picked, and `linear_logprob` runs *inside the
lm_head module's call*, so that ZeRO-3, FSDP2 and PEFT gather and release its weight as for logits.

Patch before DDP, FSDP or ZeRO wrap the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ...kernels.linear_logprob import TRAINING_TAIL_EPS, Backend, HeadStats, Tail, linear_logprob
from ..errors import UserError
from ..packing.masks import packed_arguments
from ..parallel.groups import Place
from ..parallel.rows import SharedRow
from .adapters import LEAVE_OUT, bare_model
from .experts import balance_loss
from .images import with_image_features
from .logits import logit_settings
from .tensor_parallel import check_sharded, is_sharded, sharded_scores

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
    place: Place | None = None
    """Among the ranks that share each row."""


def patch_head(
    model: PreTrainedModel,
    *,
    tail: Tail = "mean",
    tail_eps: float = TRAINING_TAIL_EPS,
    backend: Backend = "auto",
    figures: bool = False,
    place: Place | None = None,
) -> Scoring:
    """Teach ``model`` to return log-probs of given tokens; see the module's docstring.

    The model then takes ``select`` [N] int64, flat positions in [batch * length] whose hidden
    states predict, and ``targets`` [N] int64, the tokens they should predict; it returns
    `ScoredTokens`. Rows that pack several sequences, or pairs that share their prompt, come with
    ``position_ids``, ``segment_ids`` and ``branch_ids`` [batch, length] and no attention mask; see
    `PairCollator`, which makes all of these. With ``router_weights`` [batch · length] it also
    returns a mixture's ``aux_loss``, see `model.experts`. With a ``place`` among ranks that share
    each row it takes ``own_targets`` too, and every rank returns the scores of all targets.
    Patching twice replaces the settings. Of an adapter's model the base is patched.

    Raises:
        UserError: an encoder-decoder model, an adapter on the head, or no head at all.
    """
    model = bare_model(model)
    _check_model(model)
    logits = logit_settings(model.config)
    scoring = Scoring(
        **logits, tail=tail, tail_eps=tail_eps, backend=backend, figures=figures, place=place
    )
    head: Any = model.get_output_embeddings()
    patched: Any
    for patched, forward in ((head, _head_forward), (model, _model_forward)):
        # accelerate's hooks (device_map) stand around what they keep under another name.
        name = "_old_forward" if hasattr(patched, "_old_forward") else "forward"
        if not hasattr(patched, "unpatched_forward"):
            patched.unpatched_forward = getattr(patched, name)
        patched.scoring = scoring
        setattr(patched, name, _Bound(forward, patched))
    model._replicate_for_data_parallel = _refuse_replicas
    return scoring


def _refuse_replicas() -> NoReturn:
    raise UserError(
        "model: start one process for each GPU with torchrun or accelerate launch, or show one GPU "
        "(CUDA_VISIBLE_DEVICES=0); torch.nn.DataParallel would split select apart from its rows"
    )


class _Bound:
    """A method of one module, which `torch.save` of the module takes, unlike ``MethodType``'s."""

    def __init__(self, function: Callable[..., Any], module: Any) -> None:
        self.function, self.__self__ = function, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What accelerate wraps in autocast, and binds to the module again."""
        function = self.function

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(module, *args, **kwargs)

        module = inspect.Parameter("module", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [module, *self.__signature__.parameters.values()]
        vars(forward)["__signature__"] = inspect.Signature(parameters)
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments added, and the module's own: `generate` passes only what it finds here."""
        arguments = {
            p.name: p
            for function in (self.function, self.__self__.unpatched_forward)
            for p in inspect.signature(function).parameters.values()
            if p.name != "self" and p.kind != p.VAR_POSITIONAL
        }
        return inspect.Signature(sorted(arguments.values(), key=lambda p: p.kind))


def _model_forward(
    self: Any,
    *args: Any,
    select: Tensor | None = None,
    targets: Tensor | None = None,
    segment_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    router_weights: Tensor | None = None,
    own_targets: Tensor | None = None,
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
    if kwargs.get("inputs_embeds") is not None:
        raise UserError(
            "inputs_embeds: give input_ids, in which select counts its positions; the virtual "
            "tokens of prompt tuning would move them, so train LoRA or prefix tuning"
        )
    head = self.get_output_embeddings()
    # peft's wrapper of a parameter calls the module inside.
    if not hasattr(head, "unpatched_forward") and not hasattr(head, "parameter_name"):
        raise UserError(
            "model: call patch_head once more after lm_head was replaced, as "
            f"resize_token_embeddings does, and {LEAVE_OUT}; it is a new {type(head).__name__}"
        )
    kwargs["use_cache"] = False
    row, count = None, len(targets)
    if own_targets is not None:
        row = SharedRow(self.scoring.place, kwargs["input_ids"].shape[1])
        kwargs |= {name: row.own(kwargs[name]) for name in ("input_ids", "position_ids")}
        kwargs["shared_row"] = row
        select, targets = row.own_places(select[own_targets]), targets[own_targets]
        router_weights = None if router_weights is None else row.own(router_weights)
    if router_weights is not None:
        kwargs["output_router_logits"] = True
    inner = inner_model(self)
    outputs = inner(*args, **with_image_features(inner, kwargs))
    hidden = outputs[0].flatten(0, -2)
    scores = head(hidden.index_select(0, select.to(hidden.device)), targets=targets)
    if row is not None:
        scores = _joined(scores, row, own_targets, count)
    token_logps, mean_logits, figures = scores
    aux_loss = None
    router_logits = getattr(outputs, "router_logits", None)  # a family's dense models have none
    if router_weights is not None and router_logits:
        top_k = self.config.get_text_config().num_experts_per_tok
        aux_loss = balance_loss(router_logits, router_weights, top_k)
    return ScoredTokens(token_logps, mean_logits, figures, aux_loss)


def _joined(scores: Any, row: SharedRow, own_targets: Any, count: int) -> tuple[Any, Any, Any]:
    """The head's three results for all ``count`` targets of a shared row, on each of its ranks."""
    token_logps, mean_logits, figures = scores
    kinds = [token_logps, mean_logits, *(() if figures is None else figures)]
    everyone = row.joined(torch.stack([each.to(token_logps) for each in kinds]), own_targets, count)
    rest = everyone[1:].detach().to(mean_logits)
    return everyone[0], rest[0], None if figures is None else rest[1:]


# Its operators are opaque to torch.compile anyway, and backward writes into what forward returned
# (the statistics), which a compiled graph cannot have.
@torch.compiler.disable
def _head_forward(self: Any, input: Tensor, targets: Tensor | None = None) -> Any:
    if targets is None:
        return self.unpatched_forward(input)
    scoring, hidden = self.scoring, input
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(self.weight.dtype)
    bias = getattr(self, "bias", None)
    asked = scoring.figures
    names = ("logit_scale", "softcap", "tail", "tail_eps", "backend")
    settings: dict[str, Any] = {name: getattr(scoring, name) for name in names}
    if is_sharded(self):
        return *sharded_scores(self, hidden, targets, asked, settings), None
    token_logps, stats, *figures = linear_logprob(
        hidden,
        self.weight,
        targets,
        bias=bias,
        **settings,
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
    check_sharded(head)
    if type(head) is not nn.Linear and not hasattr(head, "unpatched_forward"):
        raise UserError(
            f"model: expected a plain linear lm_head, got {type(head).__name__}; {LEAVE_OUT}"
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
