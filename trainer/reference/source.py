"""A reference that fits the policy: a given one, a copy, or one that is loaded again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..errors import UserError
from ..model.adapters import bare_model
from ..model.digest import model_digest
from ..model.frozen import place_frozen
from ..model.head import patch_head
from ..model.loading import load_model, vocabulary_size
from ..packing.choose import longest_row
from ..packing.rope import fix_rope
from ..settings.checks import is_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.table import PairRows
    from ..objectives import Objective
    from ..settings.config import PreferenceConfig


def check_columns(objective: Objective) -> None:
    """Columns of a data set are sums of all tokens alike."""
    if objective.token_weights:
        raise UserError(
            f"{objective.token_weights}: leave it out, or take the columns reference_*_logps from "
            "the data: their sums weigh every token alike"
        )


def check_mismatched(
    objective: Objective, args: PreferenceConfig, rows: Sequence[PairRows | None]
) -> None:
    """Mismatched answers change with every epoch, so none is scored beforehand."""
    columns = any(part is not None and part.has_reference for part in rows)
    if objective.exchanges_answers and (args.precompute_ref_log_probs or columns):
        raise UserError(
            "kl_estimate: set it to batch, or leave out precompute_ref_log_probs and the columns "
            "reference_*_logps; the frozen model scores mismatched answers in training"
        )


def check_synced(model: PreTrainedModel | None, args: PreferenceConfig) -> None:
    """A reference can follow the policy only as another model with weights like its own."""
    if not args.sync_ref_model:
        return
    if model is None or args.precompute_ref_log_probs:
        raise UserError(
            "sync_ref_model: leave it out, or train without an adapter, precompute_ref_log_probs "
            "and reference_*_logps columns; with them no frozen model is there to follow"
        )
    if is_split(args):
        raise UserError(
            "sync_ref_model: leave it out, or train without ZeRO-3 and FSDP, which split the "
            "weights that it mixes"
        )


def check_tokenizer(args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The named reference's tokenizer, if it comes with one, has the same tokens."""
    from transformers import AutoTokenizer

    name: Any = args.ref_model_name_or_path
    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        return  # a folder with a model alone; its vocabulary's size still counts
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"ref_model_name_or_path: {name} has another tokenizer than the model, so its tokens "
            "mean other text; give a reference with the model's own tokenizer"
        )


def checked(model: PreTrainedModel, policy: Any) -> PreTrainedModel:
    """A reference that can score the policy's tokens."""
    if bare_model(model) is bare_model(policy):
        raise UserError(
            "ref_model: it is the model that trains; leave it out to compare with that model as "
            "it is now, or give another"
        )
    size, policy_size = vocabulary_size(model), vocabulary_size(policy)
    if size != policy_size:
        raise UserError(
            f"ref_model: its vocabulary has {size} tokens, the model's {policy_size}; give a "
            "reference with the model's own tokenizer"
        )
    return model


def copy_of(policy: Any, args: PreferenceConfig) -> Any:
    """A copy of the policy as it is now."""
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        name = bare_model(policy).config._name_or_path  # ZeRO-3 took the weights apart: load again
        return load_model(args, args.model_name_or_path or name)
    return copy.deepcopy(policy)


def prepare_frozen(
    model: Any, args: PreferenceConfig, rows: Sequence[PairRows | None], *, exchanged: bool = False
) -> None:
    """Let a frozen model score these rows, with the head that needs no logits.

    Args:
        exchanged: whether answers also come after other prompts than their own.
    """
    fix_rope(model, longest_row(rows, exchanged))
    model.requires_grad_(False).eval()
    patch_head(bare_model(model), **args.head_settings)


def placed(model: Any, accelerator: Any, args: PreferenceConfig) -> Any:
    """A prepared model on the device, with the kernels that the policy has."""
    if args.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, args.liger_kernel_config)
    return place_frozen(model, accelerator, args)


def loaded_again(
    name: str | None, digest: str, args: PreferenceConfig, accelerator: Any, rows: PairRows
) -> Any:
    """The frozen model that ``name`` stood for when training started, ready to score ``rows``.

    Raises:
        UserError: on all ranks, where it has no name or that stands for other weights by now.
    """
    model = load_model(args, name) if name else None
    same = [False]
    if model is not None:
        prepare_frozen(model, args, [rows])
        same = [model_digest(model, args.process_index == 0) == digest]
    if args.world_size > 1:
        broadcast_object_list(same)
    if model is None or not same[0]:
        raise UserError(
            "reference: give this data set as eval_dataset from the start, or set "
            f"precompute_ref_log_probs: false; {name!r} is no longer the frozen model's name"
        )
    return placed(model, accelerator, args)
