"""Real pairs and a small trained model, where they are at hand: the whole path on real text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from widemargin.trainer.cli import main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, not part of the project"),
]


def test_fifty_steps_lower_the_loss(tmp_path):
    settings = {
        "model_name_or_path": str(DATA / "small_lm"),
        "dataset": str(DATA / "judged_pairs_train.jsonl.gz"),
        "eval_dataset": str(DATA / "judged_pairs_test.jsonl.gz"),
        "max_eval_samples": 32,
        "objective": "lmpo",
        "beta": 2.5,
        "gamma_beta_ratio": 0.55,
        "max_length": 256,
        "max_prompt_length": 128,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "max_steps": 50,
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "eval_on_start": True,
        "save_strategy": "no",
        "use_cpu": True,
        "output_dir": str(tmp_path / "run"),
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config)]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry for entry in history if "eval_loss" in entry)
    assert after["eval_loss"] < 0.75 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three fruits."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**prompt, max_new_tokens=8)
    assert written.shape[1] > prompt["input_ids"].shape[1]
