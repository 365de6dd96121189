"""What makes two runs the same: the one table of every setting, and the facts in a manifest.

A resumed run sees the same pairs in the same steps as one that was never stopped, and updates the
same model by the same rule. The planner follows from seed, data, pairs per step and (where the
objective couples pairs) micro-batches per step; ranks and packing only deal the work out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ..data.table import PairRows
from ..data.table.columns import numbers_digest, tokens_digest
from ..errors import UserError
from ..model.adapters import bare_model
from ..model.digest import IRRELEVANT
from ..monitor.run_record import objective_facts, plain
from ..settings.coercion import is_secret
from ..settings.config import defaults_of

if TYPE_CHECKING:
    from transformers import Trainer

    from ..objectives import Objective
    from ..settings.config import PreferenceConfig

Facts = dict[str, Any]

SAME = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha average_tokens_across_devices
    bf16 fp16 dtype head_tail head_tail_eps disable_dropout router_aux_loss_coef
    sync_ref_model ref_model_sync_steps ref_model_mixup_alpha
    load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant
    chat_date seed data_seed dataloader_drop_last train_sampling_strategy ignore_data_skip
    group_by_prompt
"""
"""Settings that a resumed run must share with its checkpoint; unknown ones count as such."""

NOTED = """
    max_steps num_train_epochs max_nonfinite_steps
    load_best_model_at_end metric_for_best_model greater_is_better
    tf32 attn_implementation head_backend use_liger_kernel liger_kernel_config full_determinism
    torch_compile torch_compile_backend torch_compile_mode use_cpu
    activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs
    accelerator_config parallelism_config fsdp fsdp_config sequence_parallel_size
"""
"""Settings that may differ, and whose change is said: how long, how precisely, what is best."""

CONTENT = """
    model_name_or_path model_revision tokenizer_name_or_path tokenizer_as_saved
    ref_model_name_or_path precompute_ref_log_probs
    use_peft lora_r lora_alpha lora_dropout lora_target_modules
    lora_target_parameters use_rslora use_dora
    lora_modules_to_save objective beta gamma_beta_ratio objective_args
    dataset dataset_mixer dataset_splits columns edges edge_gap
    pair_weighting margin_from tools max_length max_prompt_length
    max_completion_length chat_template_kwargs
    truncation_mode chat_template chat_rendering auto_insert_empty_system_msg flip shuffle mix_seed
    max_train_samples stream_shard_size score per_device_train_batch_size
    gradient_accumulation_steps max_tokens_per_micro_batch packing deepspeed save_only_model
"""
"""Settings whose effect is compared in their place: tokens, weights, the objective, the plan."""

FREE = """
    output_dir run_name project report_to resume_from_checkpoint profile write_report merge_adapter
    token_metrics stop_on_collapse
    trackio_space_id trackio_bucket_id trackio_static_space_id trust_remote_code strict_data
    preprocessing_num_workers eval_dataset max_eval_samples eval_samples
    eval_samples_max_new_tokens eval_samples_temperature
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    log_level log_level_replica disable_tqdm include_num_input_tokens_seen skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    restore_callback_states_from_checkpoint auto_find_batch_size torch_empty_cache_steps use_cache
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug do_train do_eval do_predict local_rank
"""
"""Settings that change nothing of what is learnt."""

PACE = """
    logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay
    eval_on_start eval_samples per_device_eval_batch_size save_strategy save_steps token_metrics
    stop_on_collapse include_num_input_tokens_seen
"""
"""Free settings that say when ranks meet: a rank with other values would wait for the others until
``ddp_timeout``."""

KINDS = {
    name: kind
    for kind, names in {"same": SAME, "noted": NOTED, "content": CONTENT, "free": FREE}.items()
    for name in names.split()
}
_OF_NO_EFFECT = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def run_facts(
    trainer: Trainer, of_every_rank: Facts, rows: PairRows, layout: str, frozen: str
) -> Facts:
    """What a checkpoint's manifest says of its run, of plain JSON types.

    Args:
        of_every_rank: see `agreed_facts`.
        rows: of training.
        layout: of their batches.
        frozen: the digest of the weights that do not learn.
    """
    args: PreferenceConfig = trainer.args  # pyright: ignore[reportAssignmentType]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)  # pyright: ignore[reportArgumentType]
    reference: Any = getattr(trainer, "reference", None)
    config = bare_model(model).config
    text = config.get_text_config()
    facts = of_every_rank | {
        "reference": None if reference is None else reference.content(rows),
        "model": {
            "type": text.model_type,
            "hidden_size": getattr(text, "hidden_size", None),  # BLT has several
            "layers": getattr(text, "num_hidden_layers", None),
            "vocabulary": text.vocab_size,
        },
        "config": {k: v for k, v in config.to_dict().items() if k not in IRRELEVANT},
        "adapter": _adapter(model),
        "frozen": frozen,
        "ranks": args.world_size,
        "data_parallel_size": args.data_parallel_size,
        "engine": _engine(trainer),
        "packing": layout,
        "weights_only": args.save_only_model,
    }
    return json.loads(json.dumps(plain(facts), sort_keys=True))


def agreed_facts(
    args: PreferenceConfig, objective: Objective, rows: PairRows, held_out: Any
) -> Facts:
    """Facts of settings, objective and data, which are the same on every rank.

    A collective with several ranks. Names of files may differ, their tokens may not: those of
    ``held_out`` (rows, a dict of them, or None) too, except raw pairs that were assigned later.

    Raises:
        UserError: on every rank, where one was started with other settings or data.
    """
    facts = _facts_of_a_rank(args, objective, rows)
    if args.world_size == 1:
        return facts
    paced = {name: getattr(args, name) for name in PACE.split()}
    mine = facts | {"settings": facts["settings"] | paced}
    parts = held_out if isinstance(held_out, dict) else {"evaluation": held_out}
    mine["tokens of evaluation"] = {
        name: tokens_digest(part) for name, part in parts.items() if isinstance(part, PairRows)
    }
    everyone: list[Facts] = [{}] * args.world_size
    dist.all_gather_object(everyone, plain(mine))
    for rank, theirs in enumerate(everyone):
        apart = _apart(everyone[0], theirs)
        if apart:
            raise UserError(
                "start every rank with the same settings and data; from rank 0 to rank "
                f"{rank}: {'; '.join(apart[:5])}"
            )
    return facts


def _apart(first: Facts, other: Facts) -> list[str]:
    """What differs between two ranks: settings with their values, then the rest by name."""
    settings, others = first["settings"], other["settings"]
    apart = [_differs(name, settings, others) for name in _differing(settings, others)]
    return apart + [f"other {name}" for name in _differing(first, other) if name != "settings"]


def _facts_of_a_rank(args: PreferenceConfig, objective: Objective, rows: PairRows) -> Facts:
    names = [name for name in defaults_of(type(args)) if not is_secret(name)]
    return {
        "settings": {
            name: getattr(args, name)
            for name in names
            if KINDS.get(name, "same") in ("same", "noted")
        },
        "objective": objective_facts(objective),
        "couples_pairs": objective.couples_pairs,
        "pairs_per_step": args.pairs_per_step,
        "micro_batches": args.gradient_accumulation_steps,
        "limits_tokens": args.max_tokens_per_micro_batch is not None,
        "pairs": len(rows),
        "tokens": tokens_digest(rows),
        "numbers": numbers_digest(rows),
    }


def _adapter(model: Any) -> dict[str, Any]:
    """The adapters' configs; their sets in an order."""
    adapters = {}
    for name, config in getattr(model, "peft_config", {}).items():
        values = {k: v for k, v in config.to_dict().items() if k not in _OF_NO_EFFECT}
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        adapters |= {"name": name} | values
    return adapters


def _engine(trainer: Trainer) -> str:
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    return "FSDP" if trainer.is_fsdp_enabled else "none or DDP"


def compare(saved: Facts, now: Facts) -> tuple[list[str], list[str]]:
    """What forbids going on, and what is worth saying, one phrase each."""
    forbidden = ["it holds weights alone (save_only_model)"] if saved.get("weights_only") else []
    notes = []
    forbidden += _of_group("objective", saved, now)
    model = _of_group("model", saved, now)
    forbidden += model or _of_group("config", saved, now, "the model's ")
    forbidden += _of_group("adapter", saved, now)
    forbidden += [
        f"{what} has other weights"
        for name, what in (("frozen", "the base model"), ("reference", "the reference model"))
        if not model and saved.get(name) != now.get(name)
    ]
    for each in (_batches(saved, now), _ranks(saved, now)):
        forbidden += each[0]
        notes += each[1]
    if saved.get("pairs") != now["pairs"]:
        forbidden.append(f"the training data had {saved.get('pairs')} pairs, has {now['pairs']}")
    elif saved.get("tokens") != now["tokens"]:
        forbidden.append("the training data has other tokens")
    elif saved.get("numbers", "") != now.get("numbers", ""):
        forbidden.append("the training data has other weights or margins")
    before, after = saved.get("settings") or {}, now.get("settings") or {}
    for name in _differing(before, after):
        noted = KINDS.get(name, "same") == "noted"
        (notes if noted else forbidden).append(_differs(name, before, after))
    if saved.get("packing") != now.get("packing"):
        notes.append(f"{_differs('packing', saved, now)}: the same results to rounding")
    return forbidden, notes


def _of_group(group: str, saved: Facts, now: Facts, title: str = "") -> list[str]:
    before, after = saved.get(group) or {}, now.get(group) or {}
    if bool(before) != bool(after):
        return [f"{group} was {'there' if before else 'none'}, is {'there' if after else 'none'}"]
    keys = list(_differing(before, after))
    keys = ["name"] if "name" in keys else keys  # another objective has other settings
    return [f"{title}{group} {_differs(key, before, after)}" for key in keys]


def _differing(before: Facts, after: Facts) -> Iterator[str]:
    """Names in both, as versions of transformers differ in what they have."""
    return (name for name in before if name in after and before[name] != after[name])


def _differs(name: str, before: Facts, after: Facts) -> str:
    return f"{name} was {before.get(name)}, is {after.get(name)}"


def _batches(saved: Facts, now: Facts) -> tuple[list[str], list[str]]:
    if saved.get("pairs_per_step") != now.get("pairs_per_step"):
        return [_differs("pairs_per_step", saved, now) + _batch_advice(saved, now)], []
    if saved.get("micro_batches") == now.get("micro_batches"):
        return [], []
    phrase = f"gradient_accumulation_steps was {saved['micro_batches']}, is {now['micro_batches']}"
    if now["couples_pairs"]:
        why = f" ({now['objective']['name']} couples the pairs of a global micro-batch)"
        return [phrase + why + _batch_advice(saved, now)], []
    return [], [f"{phrase}: steps keep their pairs"]


def _ranks(saved: Facts, now: Facts) -> tuple[list[str], list[str]]:
    if saved.get("engine") != now.get("engine"):
        return [_differs("engine", saved, now)], []
    if saved.get("ranks") == now.get("ranks"):
        return [], []
    phrase = _differs("ranks", saved, now)
    if now["engine"] == "DeepSpeed":
        return [f"{phrase}, and DeepSpeed's files are split by rank"], []
    return [], [f"{phrase}: steps keep their pairs, results agree to rounding, except for dropout"]


def _batch_advice(saved: Facts, now: Facts) -> str:
    """Settings that give these ranks the checkpoint's steps, where there are any."""
    steps, ranks = saved.get("micro_batches") or 1, now["data_parallel_size"]
    size, rest = divmod(saved.get("pairs_per_step") or 0, steps * ranks)
    if rest or not size:
        return f": {ranks} ranks cannot share {steps} micro-batches of its steps equally"
    advice = f": set per_device_train_batch_size: {size}, gradient_accumulation_steps: {steps}"
    if now.get("limits_tokens"):  # it would raise them again
        advice += ", and leave max_tokens_per_micro_batch out"
    return advice
