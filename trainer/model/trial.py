"""What is tried on a model before it trains: head, causality, dropout, positions, what learns."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.images.processor import IMAGES
from ..errors import UserError
from ..packing import model_inputs
from ..packing.choose import longest_row
from ..packing.rope import fix_rope
from ..packing.verify import evaluating
from ..settings.checks import is_split
from .adapters import bare_model, without_adapter
from .head import patch_head
from .images import check_images
from .loading import context_of, disable_dropout
from .stand_in import stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.table import PairRows
    from ..settings.config import PreferenceConfig

COMPARED_TOKENS = 16
"""By which two forwards are compared, for dropout."""

logger = logging.getLogger(__name__)


def trial_model(model: Any, args: PreferenceConfig) -> Any:
    """A model to try in place of one that DeepSpeed or FSDP will split; None for one they do not.

    None too, with a warning, where no small model can be made of this family.
    """
    if not is_split(args):
        return None
    small = stand_in(bare_model(model), args.device)
    if small is None:
        logger.warning(
            "model: no small %s can be made, so its head, dropout and packing are not tried before "
            "training; train a few steps on one GPU without DeepSpeed or FSDP, which tries them",
            type(bare_model(model)).__name__,
        )
        return None
    if args.disable_dropout:
        disable_dropout(small)
    patch_head(small, **args.head_settings)
    return small


def try_model(
    model: Any,
    small: Any,
    args: PreferenceConfig,
    autocast: AbstractContextManager,
    rows: Any = None,
    collate: Any = None,
) -> None:
    """Raise ``UserError`` where the head, causality or dropout is not as training needs it.

    ``small`` is what `trial_model` gave for ``model``. With images in ``rows`` of training the
    batch that ``collate`` makes of one is tried too.
    """
    if is_split(args):
        if small is None:
            return
        model = small
    with autocast:  # flash attention takes no fp32
        check_head(model)
        if args.disable_dropout:
            check_no_dropout(model)
        if model is not small and getattr(rows, "has_images", False):
            _try_images(model, rows, collate)


@torch.no_grad()
def _try_images(model: Any, rows: PairRows, collate: Any) -> None:
    """Compare a pair of ``rows`` with the model's own logits, in the batch that training makes."""
    if getattr(collate, "images", None) is None:  # the user's own
        return
    [row] = rows.__getitems__([int(rows.list_lengths(IMAGES).argmax())])
    batch: Any = collate([row])
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in model_inputs(batch).items()
    }
    with evaluating(model):
        scored = model(**inputs).token_logps[: int(batch["cu_seqlens"][1])]
        check_images(bare_model(model), collate.images, row, scored)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the head that `patch_head` made with the model's own logits on a few tokens.

    A family that treats its logits in a way this project does not know is an error here, and not
    a silently different loss. Needs weights that are not split: not under ZeRO-3 or FSDP. The
    logits are compared as they are, and amplified: small ones do not feel a softcap.

    Raises:
        UserError: log-probs differ, or a token's logits depend on those after it.
    """
    if not hasattr(bare_model(model), "scoring"):
        raise UserError("model: call patch_head(model) before check_head(model)")
    config = model.config.get_text_config()
    tokens = torch.arange(1, 9, device=model.device)[None] % config.vocab_size
    with evaluating(model):
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        _check_causal(model, tokens, logits)
        treated, known = _amplified(model, tokens)
        scored = model(
            input_ids=tokens,
            select=torch.arange(tokens.shape[1] - 1, device=tokens.device),
            targets=tokens[0, 1:],
        )
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


@torch.no_grad()
def check_no_dropout(model: PreTrainedModel) -> None:
    """Raise ``UserError`` where two forwards in training mode differ, adapters left out.

    It needs weights that are not split over ranks, and leaves the random numbers as they were.
    """
    bare: Any = bare_model(model)
    count = bare.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + COMPARED_TOKENS, device=bare.device)[None] % count
    was_training = model.training
    model.train()
    devices = [bare.device] if bare.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), without_adapter(model):
            first, second = (bare(input_ids=ids, use_cache=False).logits for _ in range(2))
    finally:
        model.train(was_training)
    apart = (first - second).abs().max().item()
    if apart <= 1e-3 * first.abs().max().clamp_min(1.0).item():  # rounding of atomic sums
        return
    named = [name for name, p in vars(bare.config.get_text_config()).items() if _is_on(name, p)]
    settings = f" ({', '.join(named)})" if named else ""
    raise UserError(
        f"disable_dropout: set the dropout in the model's config to 0{settings}, or set "
        f"disable_dropout: false; {type(bare).__name__} is still random in training mode, where "
        f"two forwards differ by {apart:.2g}"
    )


def _is_on(name: str, value: object) -> bool:
    return ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0


def fit_lengths(model: Any, parts: list[PairRows | None], *, exchanged: bool = False) -> None:
    """Check that the model has positions for all rows, and fix those that depend on a batch.

    Args:
        exchanged: whether answers also come after other prompts than their own.
    """
    longest = longest_row(parts, exchanged)
    check_positions(model, longest)
    fix_rope(bare_model(model), longest)


def check_positions(model: Any, longest: int) -> None:
    """Raise ``UserError`` for sequences that the model has no positions for.

    A model that computes positions of any number gets a warning: it was not trained on them. Which
    it is, a small model of its family shows.
    """
    bare = bare_model(model)
    limit = context_of(bare.config)
    if not isinstance(limit, int) or longest <= limit - 4:  # some count positions from 2 on
        return
    small = stand_in(bare)
    if small is None:
        fits = longest <= limit
    else:
        fix_rope(small, longest)
        fits = _runs(small, longest)
    if not fits:
        raise UserError(
            f"max_length: set it to {_most(small, limit)} or less; the data has a sequence of "
            f"{longest:,} tokens, and {type(bare).__name__} has positions for {limit:,}"
        )
    if longest > limit:
        logger.warning(
            "max_length: set it to %d, unless longer sequences are meant; the data has one of %d "
            "tokens, and the model's config names no more positions than that",
            limit,
            longest,
        )


def _most(small: Any, limit: int) -> int:
    """The longest sequence that the model takes, of the few lengths around its limit."""
    lengths = [limit - less for less in range(4)]
    return next((n for n in lengths if small is not None and _runs(small, n)), lengths[-1])


@torch.no_grad()
def _runs(model: Any, length: int) -> bool:
    try:
        ids = torch.full((1, length), 5, device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def check_learns(model: Any, optimizer: Any = None) -> None:
    """Raise ``UserError`` where nothing would learn.

    Args:
        model: at least one of its parameters must train.
        optimizer: one that the user made, or None; it must hold such a parameter.
    """
    learning = {id(it) for it in model.parameters() if it.requires_grad}
    if learning:
        groups = [] if optimizer is None else optimizer.param_groups
        if optimizer is None or any(id(it) in learning for each in groups for it in each["params"]):
            return
        raise UserError(
            "optimizers: override create_optimizer, or make the optimizer once the model has its "
            "adapter; it holds no parameter of this model that learns"
        )
    if hasattr(model, "get_base_model"):
        raise UserError(
            "model: load its adapter with is_trainable=True (PeftModel.from_pretrained), or call "
            "model.set_requires_grad(model.active_adapter); nothing of it learns as it is"
        )
    raise UserError(
        "model: call model.requires_grad_(True), or set use_peft: true to train an adapter; every "
        "parameter is frozen, so nothing would learn"
    )
