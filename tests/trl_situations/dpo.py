"""TRL's tests of DPOTrainer, one situation for each case of each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.robustness.families import tiny
from tests.trl_situations import materials
from tests.trl_situations.situation import Situation

DPO = {"objective": "dpo"}
ONCE = {"precompute_ref_log_probs": True}
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
NO_IMAGES = "images: give the model's own processor"

FAMILIES = [
    *("cohere2", "glm4_moe", "gpt_oss", "qwen2", "qwen3_moe", "nemotron_h", "olmo3", "lfm2"),
]
VISION = [
    *("gemma3", "gemma4", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_5", "qwen3_5_moe"),
]
FORMS = [
    *("set", "stream", "dict of sets", "dict of streams", "sets", "streams"),
]
"""A data set, or two by name: in a dict, or in a class of datasets for them."""

#: loss_type, and the objective that the line asks for where the name means several losses.
LOSSES: dict[str, dict[str, Any] | None] = {
    "sigmoid": DPO,
    "hinge": {"objective": "dpo-hinge"},
    "ipo": {"objective": "ipo"},
    "exo_pair": None,
    "nca_pair": None,
    "robust": None,
    "bco_pair": None,
    "sppo_hard": None,
    "aot": None,
    "aot_unpaired": None,
    "apo_zero": None,
    "apo_down": None,
    "discopop": None,
    "sft": None,
    "sigmoid_norm": None,
}
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.0}


def _loss(name: str, instead: dict[str, Any] | None) -> Situation:
    settings = {"loss_type": name, **STEPS}
    if name in SMOOTHED:
        settings["label_smoothing"] = SMOOTHED[name]
    return Situation(
        *("dpo", "train_loss_types", name, settings),
        evaluation="standard",
        said="means another loss in each library" if instead else "",
        instead=None if instead is None else {**instead, **STEPS},
        quick=name == "hinge",
    )


def dpo(test: str, case: str = "", settings: Any = None, **others: Any) -> Situation:
    return Situation("dpo", test, case, DPO | (settings or {}), **others)


def left_one(trainer: Any) -> bool:
    return len(trainer.train_dataset) == 1


def named_in_card(trainer: Any) -> bool:
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    return f"- {trainer.objective.name}\n" in card


METRIC = {"compute_metrics": lambda _: {"my_metric": 0.123}}


def has_metric(trainer: Any) -> bool:
    return any(entry.get("eval_my_metric") == 0.123 for entry in trainer.state.log_history)


TEXT = [
    *(dpo("train", family, model=family, quick=family == "lfm2") for family in FAMILIES),
    dpo("train", "lfm2, its other tokenizer", model="lfm2", tokenizer="without padding"),
    *(
        dpo(
            *("evaluate_with_eval_dataset", f"{form}{', precomputed' if once else ''}"),
            ONCE if once else {},
            model="by name",
            later=f"standard: {form}",
            then="evaluate",
            quick=once and form in ("stream", "dict of sets"),
        )
        for once in (False, True)
        for form in FORMS
    ),
    dpo(
        "evaluate_precompute_ref_log_probs_after_training_raises",
        settings=ONCE,
        model="by name",
        later="conversational",
    ),
    *(
        dpo(
            *("evaluate_precompute_ref_log_probs_at_init_after_training", form),
            ONCE,
            evaluation=f"standard: {form}",
        )
        for form in ("set", "dict of sets", "sets")
    ),
    dpo(
        *("trust_remote_code", "not given"),
        model="remote code",
        said="set trust_remote_code: true to run that code",
        instead={**DPO, "trust_remote_code": True},
        quick=True,
    ),
    dpo("trust_remote_code", "given", {"trust_remote_code": True}, model="remote code"),
    *(
        dpo("train_dataset_format", kind, data=kind, quick=kind == "conversational implicit")
        for kind in ("standard", "conversational", "implicit", "conversational implicit")
    ),
    dpo("train_gpt_oss", model="gpt_oss", data="harmony", tokenizer="calling"),
    dpo("train_model"),
    *(_loss(name, instead) for name, instead in LOSSES.items()),
    Situation(
        *("dpo", "train_multi_loss_types"), settings={"loss_type": ["sigmoid", "bco_pair", "sft"]}
    ),
    dpo("train_with_wpo", settings={"use_weighting": True}),
    dpo("train_with_ld", settings={"ld_alpha": 0.5}),
    *(
        dpo("train_with_f_divergence", kind, {"f_divergence_type": kind})
        for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    ),
    dpo("train_with_explicit_ref_model", arguments={"ref_model": lambda: tiny("qwen2")}),
    dpo("train_with_sync_ref_model", settings={"sync_ref_model": True, "ref_model_sync_steps": 2}),
    dpo(
        "train_model_dtype",
        settings={"model_init_kwargs": {"dtype": "float16"}},
        model="by name",
        tokenizer="left out",
    ),
    dpo("train_dense_with_peft_config_lora", model="by name", adapter="lora", quick=True),
    dpo("train_moe_with_peft_config", model="gpt_oss", adapter="experts"),
    dpo("train_peft_model", model="in an adapter"),
    dpo("train_moe_peft_model", model="experts in an adapter"),
    dpo(
        "train_with_peft_config_and_gradient_checkpointing",
        settings={"gradient_checkpointing": True},
        adapter="lora",
        quick=True,
    ),
    dpo("train_with_liger", settings={"use_liger_kernel": True}, said="use_liger_kernel: ",
        quick=True),
    dpo(
        "train_with_liger_kernel_and_peft",
        settings={"use_liger_kernel": True},
        adapter="lora",
        said="use_liger_kernel: ",
    ),
    dpo(
        "liger_kernel_with_peft_lm_head_raises",
        adapter="lm_head",
        said="leave lm_head out of target_modules",
        quick=True,
    ),
    dpo(
        "liger_kernel_with_peft_prompt_learning_raises",
        adapter="prompt tuning",
        said="use LoRA or another adapter of weights",
    ),
    dpo(
        "init_fails_with_moe_aux_loss_and_liger",
        settings={"use_liger_kernel": True},
        model="qwen3_moe",
        said="use_liger_kernel: ",
    ),
    dpo(
        "init_fails_with_compute_metrics_and_liger",
        settings={"use_liger_kernel": True},
        arguments=METRIC,
        said="use_liger_kernel: ",
    ),
    dpo("precompute_ref_log_probs_raises_for_iterable", "train", ONCE, data="standard: stream"),
    *(
        dpo(
            *("precompute_ref_log_probs_raises_for_iterable", form, ONCE),
            evaluation=f"standard: {form}",
        )
        for form in ("stream", "dict of streams", "streams")
    ),
    dpo("train_with_iterable_dataset", data="standard: stream", quick=True),
    dpo(
        "train_padding_free",
        settings={
            "padding_free": True,
            "model_init_kwargs": {"attn_implementation": "kernels-community/flash-attn2"},
            "bf16": True,
        },
        model="by name",
        said="attn_implementation: kernels-community/flash-attn2 needs a GPU",
        quick=True,
    ),
    dpo("train_with_chat_template_kwargs", data="template arguments", tokenizer="shouting"),
    dpo(
        "fully_truncated_completion_examples_dropped",
        settings={"max_length": 6, "truncation_mode": "keep_start"},
        data="too long",
        then="make",
        check=left_one,
        quick=True,
    ),
    dpo("train_toolcall_data", settings={"max_length": 512, "max_prompt_length": None},
        data="tool calls", tokenizer="calling", quick=True),
    dpo("train_with_eval", settings=STEPS, evaluation="standard"),
    dpo("train_with_multiple_eval_dataset", settings=STEPS, evaluation="standard: dict of sets"),
    dpo("init_with_train_dataset", "set", then="make"),
    dpo("init_with_train_dataset", "stream", data="standard: stream", then="make"),
    dpo("init_with_train_dataset", "none", data="none", said="train_dataset: ", quick=True),
    dpo("init_with_train_dataset", "sets", data="standard: sets", said="give one of its splits"),
    *(
        dpo("init_with_eval_dataset", form, evaluation=f"standard: {form}", then="make")
        for form in FORMS
    ),
    dpo("init_with_eval_dataset", "none", then="make"),
    dpo(
        "train_with_compute_metrics",
        settings=STEPS,
        evaluation="standard",
        arguments=METRIC,
        check=has_metric,
        quick=True,
    ),
    dpo("train_with_gradient_checkpointing", settings={"gradient_checkpointing": True}),
    dpo("tag_added", check=named_in_card),
    dpo("tag_added_peft", adapter="lora", check=named_in_card),
    dpo(
        "peft_with_quantization",
        model="by name",
        adapter="lora",
        arguments={"quantization_config": materials.QUANTIZED},
        said="bitsandbytes",
        quick=True,
    ),
]  # fmt: skip

WITH_IMAGES = [
    *(
        dpo("train_vlm", family, model=f"vision {family}", data="images", said=NO_IMAGES,
            quick=family == "qwen2_5_vl")
        for family in VISION
    ),
    dpo("train_vlm_multi_image", model="vision qwen2_5_vl", data="several images", said=NO_IMAGES),
    *(
        dpo("train_vlm_text_only_data", kind, model="vision qwen2_5_vl", data=kind)
        for kind in ("conversational", "standard")
    ),
    dpo("train_vlm_with_max_length", settings={"max_length": 37}, model="vision qwen2_5_vl",
        data="images", said=NO_IMAGES),
    dpo("train_vlm_keep_end_raises", settings={"truncation_mode": "keep_end"},
        model="vision qwen2_5_vl", data="images", said=NO_IMAGES),
    dpo("vision_dataset_with_text_model_raises", data="images", said=NO_IMAGES),
    dpo("precompute_ref_log_probs_raises_for_vision", settings=ONCE, model="vision qwen2_5_vl",
        data="images", said=NO_IMAGES),
    dpo("train_vlm_liger", settings={"use_liger_kernel": True}, model="vision qwen2_5_vl",
        data="images", said="use_liger_kernel: "),
]  # fmt: skip

TABLE = TEXT + WITH_IMAGES
