"""Whether a reference that is given fits the policy, and a copy where none is."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..model.adapters import bare_model
from ..model.loading import load_model, vocabulary_size
from ..settings.checks import is_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..objectives import Objective
    from ..settings.config import PreferenceConfig


def check_columns(objective: Objective) -> None:
    """Columns of a data set are sums of all tokens alike."""
    if objective.token_weights:
        raise UserError(
            f"{objective.token_weights}: leave it out, or take the columns reference_*_logps from "
            "the data: their sums weigh every token alike"
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
