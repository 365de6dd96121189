"""A reference that fits the policy: one given, copied, loaded again, or one that follows it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..errors import UserError
from ..model.adapters import bare_model
from ..model.digest import model_digest
from ..model.head import patch_head
from ..model.loading import load_model, vocabulary_size
from ..model.tensor_parallel import refuse_sharded
from ..packing.choose import longest_row
from ..packing.rope import fix_rope
from ..packing.verify import compare_with_alone
from ..settings.checks import is_split

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.table import PairRows
    from ..objectives import Objective
    from ..packing.choose import Packing
    from ..settings.config import PreferenceConfig

REFERENCE_FILE = "reference.safetensors"


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


def check_packing(model: Any, packing: Packing) -> None:
    """Another model may run an attention that reads packed rows otherwise."""
    problem = compare_with_alone(model, packing)
    if problem is not None:
        raise UserError(
            f"ref_model: it does not take the rows that the model does ({packing.layout}): "
            f"{problem}; load it with the same attn_implementation, or set packing: padded"
        )


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
    refuse_sharded(model)
    patch_head(bare_model(model), **args.head_settings)


def placed(model: Any, accelerator: Accelerator, args: PreferenceConfig) -> Any:
    """A prepared model on all ranks, with the kernels that the policy has.

    Under FSDP2 and ZeRO-3 its weights are split as the policy's are; otherwise every rank has all
    of them; DDP, which exchanges gradients, is left out.
    """
    if args.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, args.liger_kernel_config)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError(
                "fsdp_version: a reference model needs version 2; set it, or train without FSDP"
            )
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        if getattr(model, "is_quantized", False):  # placed when it was loaded
            return model
        return model.to(args.device)
    config = _inference_config(accelerator, bare_model(model).config.get_text_config().hidden_size)
    if config["zero_optimization"]["stage"] == 3:
        import deepspeed  # pyright: ignore[reportMissingImports] (an extra)

        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        return engine
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return model.to(args.device, dtypes.get(accelerator.mixed_precision))


def _inference_config(accelerator: Accelerator, hidden_size: int) -> dict[str, Any]:
    """The run's DeepSpeed settings without an optimizer, and buffers sized as transformers does."""
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)  # pyright: ignore
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero["stage"] == 3:
        zero |= {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    return config


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


class SyncedReference(TrainerCallback):
    """TR-DPO, arXiv 2404.09656: mixes the policy into the frozen ``model`` as the settings say.

    Every ``ref_model_sync_steps`` steps its weights become ``ref_model_mixup_alpha`` times the
    policy's plus the rest of its own, in its dtype. They are saved with each checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = dict(bare_model(kwargs["model"]).named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.lerp_(policy[name].to(parameter.dtype), args.ref_model_mixup_alpha)

    def save(self, folder: str) -> None:
        """Write the weights as they are now into a checkpoint; call it on one rank."""
        weights = {name: p.detach().cpu() for name, p in self.model.named_parameters()}
        save_file(weights, Path(folder) / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Take up the weights of a checkpoint."""
        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            raise UserError(
                f"checkpoint {folder}: it has no {REFERENCE_FILE}, which sync_ref_model needs "
                "to go on; take one of a run with that setting"
            )
        weights = load_file(path)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])
