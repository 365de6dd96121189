"""The settings files of the SimPO, LMPO and gamma-PO repositories: their keys and values."""

from __future__ import annotations

from typing import Any

ULTRA = ("HuggingFaceH4/ultrafeedback_binarized", ["train_prefs", "test_prefs"])
MISTRAL = ("mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback")
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
ZEPHYR = "alignment-handbook/zephyr-7b-sft-full"
LLAMA_SFT = "princeton-nlp/Llama-3-Base-8B-SFT"
GEMMA = "google/gemma-2-9b-it"

COMMON = {
    "torch_dtype": None,
    "attn_implementation": "flash_attention_2",
    "dataset_splits": ["train", "test"],
    "preprocessing_num_workers": 12,
    "bf16": True,
    "do_eval": True,
    "evaluation_strategy": "steps",
    "eval_steps": 400,
    "gradient_accumulation_steps": 16,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "simpo-exps",
    "log_level": "info",
    "logging_steps": 5,
    "lr_scheduler_type": "cosine",
    "max_length": 2048,
    "max_prompt_length": 1800,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "run_name": "a-run",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "push_to_hub": False,
    "save_strategy": "steps",
    "save_steps": 1000000,
    "report_to": ["wandb"],
    "save_total_limit": 20,
    "seed": 42,
    "warmup_ratio": 0.1,
}
GAMMA_PO = {
    "length_norm": True,
    "trainer_type": "simpo",
    "loss_type": "gm-simpo",
    "preprocessing_num_workers": 20,
    "save_total_limit": 1,
}
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content | trim + "
    "'<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def _file(
    model: str, data: str, beta: float, ratio: float, rate: str, **more: Any
) -> dict[str, Any]:
    own = {"model_name_or_path": model, "dataset_mixer": {data: 1.0}, "beta": beta}
    return COMMON | own | {"gamma_beta_ratio": ratio, "learning_rate": rate} | more


def _base(model: str, ratio: float, rate: str, **more: Any) -> dict[str, Any]:
    data, splits = ULTRA
    return _file(model, data, 2.0, ratio, rate, dataset_splits=splits, **more)


def _four(method: str) -> dict[str, dict[str, Any]]:
    short = {"max_length": 1024, "max_prompt_length": 512}
    return {
        f"{method}-mistral-7b-base": _base(ZEPHYR, 0.8, "3.0e-7", **short),
        f"{method}-mistral-7b-instruct": _file(*MISTRAL, 2.5, 0.1, "5.0e-7"),
        f"{method}-llama3-8b-base": _base(LLAMA_SFT, 0.5, "6.0e-7"),
        f"{method}-llama3-8b-instruct": _file(
            LLAMA, "princeton-nlp/llama3-ultrafeedback", 2.5, 0.55, "1.0e-6"
        ),
    }


_ARMO = "princeton-nlp/llama3-ultrafeedback-armorm"
_GEMMA = {"attn_implementation": "eager", "chat_template": GEMMA_TEMPLATE}
_GEMMA_DATA = "princeton-nlp/gemma2-ultrafeedback-armorm"

#: By the name of our file with the same values.
FILES: dict[str, dict[str, Any]] = {
    **_four("lmpo"),
    **_four("simpo"),
    "simpo-llama3-8b-instruct-v0.2": _file(LLAMA, _ARMO, 10, 0.3, "1.0e-6"),
    "simpo-gemma2-9b-it": _file(GEMMA, _GEMMA_DATA, 10, 0.5, "8.0e-7", **_GEMMA),
    "gamma-simpo-llama3-8b-instruct": _file(
        LLAMA, _ARMO, 10, 0.4, "1.0e-6", tau=10, label_smoothing=0, **GAMMA_PO
    ),
    "gamma-simpo-mistral-7b-instruct": _file(*MISTRAL, 2.5, 0.15, "6.0e-7", tau=10, **GAMMA_PO),
    "gamma-simpo-gemma2-9b-it": _file(
        GEMMA,
        _GEMMA_DATA,
        10,
        0.5,
        "8.0e-7",
        tau=20,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=2,
        **GAMMA_PO | _GEMMA,
    ),
    "gamma-simpo-qwen2.5-7b-instruct": _file(
        "Qwen/Qwen2.5-7B-Instruct",
        "data/qwen_ultrafeedback",
        10,
        0.3,
        "1.0e-6",
        tau=3,
        per_device_eval_batch_size=2,
        **GAMMA_PO,
    ),
}


def _early(name: str, gamma: float, **more: Any) -> dict[str, Any]:
    left = {"gamma_beta_ratio", "attn_implementation"}
    kept = {key: value for key, value in FILES[name].items() if key not in left}
    return kept | {"gamma": gamma, "use_flash_attention_2": True} | more


#: First versions of SimPO's files, and two that LMPO's repository kept: the margin is absolute.
EARLY: dict[str, dict[str, Any]] = {
    "mistral-base": _early("simpo-mistral-7b-base", 1.6, gradient_accumulation_steps=8),
    "mistral-base-fp32": _early("simpo-mistral-7b-base", 1.6, bf16=False),
    "llama-base-full": _early(
        "simpo-llama3-8b-base",
        1.0,
        torch_dtype="bfloat16",
        lora_r=128,
        lora_alpha=128,
        lora_dropout=0.05,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        save_strategy="epoch",
    ),
    "mistral-base-qlora": _early(
        "simpo-mistral-7b-base",
        1.6,
        model_name_or_path="alignment-handbook/zephyr-7b-sft-qlora",
        use_flash_attention_2=False,
        use_peft=True,
        load_in_4bit=True,
        lora_r=128,
        lora_alpha=128,
        lora_dropout=0.05,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        bf16=False,
        max_length=512,
        max_prompt_length=256,
    ),
}


def script_of(name: str) -> str:
    """The published script that trains this file, by its twin's name."""
    method = name.split("-")[0]
    return {"lmpo": "run_lmpo", "simpo": "run_simpo", "gamma": "run_xpo"}[method]
