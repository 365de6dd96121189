"""TRL's tests of KTOTrainer, one situation for each case of each test."""

from __future__ import annotations

from typing import Any

from tests.robustness.families import tiny
from tests.trl_situations import materials
from tests.trl_situations.dpo import (
    FORMS,
    METRIC,
    NO_IMAGES,
    ONCE,
    STEPS,
    VISION,
    has_metric,
    left_one,
    named_in_card,
)
from tests.trl_situations.situation import Situation

KTO = {"objective": "kto", "kl_estimate": "mismatched"}  # as KTOConfig's default is
UNPAIRED = {"loss_type": "apo_zero_unpaired"}
NO_KL = "kl_estimate: set it to batch, or leave out precompute_ref_log_probs"
NO_PAIRS = "or give it single answers: prompt, completion and label"


def kto(test: str, case: str = "", settings: Any = None, **others: Any) -> Situation:
    settings = settings or {}
    named = {} if "loss_type" in settings else KTO
    return Situation("kto", test, case, named | settings, **{"data": "unpaired"} | others)


TEXT = [
    kto(
        *("train", "kto on pairs", {"loss_type": "kto", **ONCE}),
        data="standard",
        evaluation="standard",
        said="objective: kto",
        instead={"objective": "kto", **ONCE},
    ),
    kto(
        *("train", "kto", {"loss_type": "kto"}),
        evaluation="unpaired",
        said="kl_estimate: mismatched",
        instead=KTO,
        quick=True,
    ),
    kto(
        *("train", "apo_zero_unpaired on pairs", UNPAIRED | ONCE),
        data="conversational implicit",
        evaluation="conversational implicit",
        said=NO_PAIRS,
        instead={"objective": "apo-zero"},
        quick=True,
    ),
    kto("train", "apo_zero_unpaired", UNPAIRED, evaluation="unpaired"),
    kto(
        *("fully_truncated_completion_examples_dropped", "", {"max_length": 6}),
        data="too long, labelled",
        then="make",
        check=left_one,
    ),
    *(
        kto(
            *("evaluate_with_eval_dataset", f"{form}{', precomputed' if once else ''}"),
            UNPAIRED | (ONCE if once else {}),
            model="by name",
            later=f"unpaired: {form}",
            then="evaluate",
            quick=once and form == "dict of streams",
        )
        for once in (False, True)
        for form in FORMS
    ),
    kto(
        *("evaluate_precompute_ref_log_probs_after_training_raises", "", ONCE),
        model="by name",
        later="conversational unpaired",
        said=NO_KL,
        instead={"objective": "kto", **ONCE},
    ),
    *(
        kto(
            *("evaluate_precompute_ref_log_probs_at_init_after_training", form, ONCE),
            evaluation=f"unpaired: {form}",
            said=NO_KL,
            instead={"objective": "kto", **ONCE},
        )
        for form in ("set", "dict of sets", "sets")
    ),
    kto(
        *("trust_remote_code", "not given"),
        model="remote code",
        said="set trust_remote_code: true to run that code",
    ),
    kto("trust_remote_code", "given", {"trust_remote_code": True}, model="remote code"),
    kto("train_gpt_oss", settings=UNPAIRED, model="gpt_oss", data="labelled harmony",
        tokenizer="calling"),
    kto(
        "train_with_ref_model_is_model_raises",
        arguments={"ref_model": "the model itself"},
        said="ref_model: ",
        quick=True,
    ),
    kto("train_without_providing_ref_model", evaluation="unpaired"),
    kto("train_without_providing_ref_model_with_lora", evaluation="unpaired",
        adapter="lora with dropout"),
    kto("compute_metrics", settings=STEPS, evaluation="unpaired", arguments=METRIC,
        check=has_metric),
    kto("train_with_explicit_ref_model", arguments={"ref_model": lambda: tiny("qwen2")}),
    kto("train_with_sync_ref_model", settings={"sync_ref_model": True, "ref_model_sync_steps": 2}),
    kto("train_model_dtype", settings={"model_init_kwargs": {"dtype": "float16"}},
        model="by name", tokenizer="left out"),
    kto("train_peft_model", model="in an adapter"),
    kto("train_with_peft_config_and_gradient_checkpointing",
        settings={"gradient_checkpointing": True}, adapter="lora"),
    kto("train_with_liger", settings={"use_liger_kernel": True}, said="use_liger_kernel: "),
    kto("train_with_liger_kernel_and_peft", settings={"use_liger_kernel": True}, adapter="lora",
        said="use_liger_kernel: "),
    kto("liger_kernel_with_peft_lm_head_raises", adapter="lm_head",
        said="leave lm_head out of target_modules"),
    kto("liger_kernel_with_peft_prompt_learning_raises", adapter="prompt tuning",
        said="use LoRA or another adapter of weights"),
    kto("init_fails_with_compute_metrics_and_liger", settings={"use_liger_kernel": True},
        arguments=METRIC, said="use_liger_kernel: "),
    kto("init_fails_with_moe_aux_loss_and_liger", settings={"use_liger_kernel": True},
        model="qwen3_moe", said="use_liger_kernel: "),
    kto("precompute_ref_log_probs_raises_for_iterable", "train", UNPAIRED | ONCE,
        data="unpaired: stream"),
    *(
        kto("precompute_ref_log_probs_raises_for_iterable", form, UNPAIRED | ONCE,
            evaluation=f"unpaired: {form}")
        for form in ("stream", "dict of streams", "streams")
    ),
    kto("train_with_iterable_dataset", "kto", data="unpaired: stream"),
    kto("train_with_iterable_dataset", "apo_zero_unpaired", UNPAIRED, data="unpaired: stream"),
    kto("train_with_chat_template_kwargs", data="labelled template arguments",
        tokenizer="shouting"),
    kto("train_toolcall_data", settings={"max_length": 512, "max_prompt_length": None},
        data="labelled tool calls", tokenizer="calling"),
    kto("train_with_eval", settings=STEPS, evaluation="unpaired"),
    kto("train_with_multiple_eval_dataset", settings=STEPS, evaluation="unpaired: dict of sets"),
    kto("init_with_train_dataset", "set", then="make"),
    kto("init_with_train_dataset", "stream", data="unpaired: stream", then="make"),
    kto("init_with_train_dataset", "none", data="none", said="train_dataset: "),
    kto("init_with_train_dataset", "sets", data="unpaired: sets", said="give one of its splits"),
    *(
        kto("init_with_eval_dataset", form, UNPAIRED, evaluation=f"unpaired: {form}", then="make")
        for form in FORMS
    ),
    kto("init_with_eval_dataset", "none", then="make"),
    kto("train_with_gradient_checkpointing", settings={"gradient_checkpointing": True}),
    kto("tag_added", check=named_in_card),
    kto("tag_added_peft", adapter="lora", check=named_in_card),
    kto("peft_with_quantization", model="by name", adapter="lora",
        arguments={"quantization_config": materials.QUANTIZED}, said="bitsandbytes"),
]  # fmt: skip

WITH_IMAGES = [
    *(
        kto("train_vlm", family, model=f"vision {family}", data="labelled images", said=NO_IMAGES)
        for family in VISION
    ),
    kto("train_vlm_multi_image", model="vision qwen2_5_vl", data="several labelled images",
        said=NO_IMAGES),
    kto("train_vlm_apo_zero_unpaired", settings=UNPAIRED, model="vision qwen2_5_vl",
        data="labelled images", said=NO_IMAGES),
    *(
        kto("train_vlm_text_only_data", kind, model="vision qwen2_5_vl", data=kind)
        for kind in ("conversational unpaired", "unpaired")
    ),
    kto("train_vlm_with_max_length", settings={"max_length": 37}, model="vision qwen2_5_vl",
        data="labelled images", said=NO_IMAGES),
    kto("vision_dataset_with_text_model_raises", data="labelled images", said=NO_IMAGES),
    kto("precompute_ref_log_probs_raises_for_vision", settings=ONCE, model="vision qwen2_5_vl",
        data="labelled images", said=NO_IMAGES),
    kto("train_vlm_liger", settings={"use_liger_kernel": True}, model="vision qwen2_5_vl",
        data="labelled images", said="use_liger_kernel: "),
]  # fmt: skip

TABLE = TEXT + WITH_IMAGES
