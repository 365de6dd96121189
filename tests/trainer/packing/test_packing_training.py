"""Training gives the same parameters in every layout, on one process and on two."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.packing import PairCollator

from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)
from tests.support.two_ranks import launch

PACKINGS = ("padded", "packed", "prefix_shared")
RUN: dict[str, Any] = {"max_steps": 10, "pairs": 22, "gradient_accumulation_steps": 2}
"""Ten steps of 8 pairs; of an epoch's 22 the third has 6."""


def model_with(attention: str) -> Any:
    model: Any = tiny_model("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    model.config._attn_implementation = attention
    return model


@pytest.mark.costly
@pytest.mark.parametrize("objective", ["simpo", "lmpo"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ten_steps_are_the_same_in_every_packing(tmp_path, attention, objective):
    before = parameters_of(model_with(attention))
    after = {}
    for packing in PACKINGS:
        model = model_with(attention)
        trainer = tiny_trainer(tmp_path, model, packing=packing, objective=objective, **RUN)
        assert trainer.pipeline.packing is not None
        assert trainer.pipeline.packing.layout == packing
        trainer.train()
        after[packing] = parameters_of(model)
    assert (after["padded"] - before).abs().max() > 1e-2
    for packing in PACKINGS[1:]:
        assert (after[packing] - after["padded"]).abs().max() < 1e-5


@pytest.mark.costly
def test_two_processes_give_the_same_in_every_packing(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(22).to_json(tmp_path / "train.jsonl")
    (tmp_path / "config.yaml").write_text(
        "{model_name_or_path: ./model, dataset: train.jsonl, objective: lmpo, optim: sgd, "
        "learning_rate: 0.05, lr_scheduler_type: constant, max_grad_norm: 0.0, head_tail: exact, "
        "max_steps: 10, gradient_accumulation_steps: 2, save_strategy: 'no', use_cpu: true, "
        "ddp_backend: gloo, per_device_train_batch_size: 2, write_report: false}"
    )
    (tmp_path / "runs.py").write_text(
        "import sys\n"
        "from widemargin.trainer.cli import main\n"
        "for packing in sys.argv[1:]:\n"
        "    settings = [f'--packing={packing}', f'--output_dir={packing}']\n"
        "    assert main(['train', 'config.yaml', *settings]) == 0\n"
    )
    done = launch(tmp_path, "runs.py", *PACKINGS)
    assert done.returncode == 0, done.stderr[-2000:]
    after = {
        packing: parameters_of(AutoModelForCausalLM.from_pretrained(tmp_path / packing))
        for packing in PACKINGS
    }
    assert (after["padded"] - parameters_of(tiny_model())).abs().max() > 1e-2
    for packing in PACKINGS[1:]:
        assert (after[packing] - after["padded"]).abs().max() < 1e-5


@pytest.mark.slow
def test_two_processes_count_prompts_and_tokens_as_one_does(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(22).to_json(tmp_path / "train.jsonl")
    (tmp_path / "config.yaml").write_text(
        f"{{model_name_or_path: {tmp_path}/model, dataset: {tmp_path}/train.jsonl, optim: sgd, "
        "objective: orpo, nll: prompt_and_answer, learning_rate: 0.05, max_steps: 4, "
        "head_tail: exact, save_strategy: 'no', use_cpu: true, ddp_backend: gloo, "
        f"logging_steps: 1, output_dir: {tmp_path}/two, report_to: none, write_report: false, "
        "per_device_train_batch_size: 4}"
    )
    (tmp_path / "runs.py").write_text(
        "from widemargin.trainer.cli import main\nassert main(['train', 'config.yaml']) == 0\n"
    )
    done = launch(tmp_path, "runs.py")
    assert done.returncode == 0, done.stderr[-2000:]
    one = ["--per_device_train_batch_size=8", f"--output_dir={tmp_path}/one"]
    assert main(["train", str(tmp_path / "config.yaml"), *one]) == 0
    for name in ("loss", "num_tokens"):
        logged = [
            [entry[name] for entry in _history(tmp_path / ranks) if name in entry]
            for ranks in ("one", "two")
        ]
        assert len(logged[0]) == 4
        assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def _history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_auto_says_what_it_chose_and_evaluation_is_the_same(tmp_path, caplog):
    losses = []
    for packing in ("auto", "padded"):
        with caplog.at_level(logging.INFO, "widemargin"):
            trainer = tiny_trainer(tmp_path, model_with("sdpa"), packing=packing, eval_pairs=7)
        losses.append(trainer.evaluate()["eval_loss"])
    assert "packing: prefix_shared (sdpa on a CPU" in caplog.text
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    after = []
    for checkpointing in (False, True):
        model = model_with("sdpa")
        settings = {"max_steps": 2, "packing": "prefix_shared"}
        tiny_trainer(tmp_path, model, gradient_checkpointing=checkpointing, **settings).train()
        after.append(parameters_of(model))
    torch.testing.assert_close(*after)


def test_a_collator_of_ones_own_keeps_its_layout(tmp_path):
    trainer = PreferenceTrainer(
        model_with("sdpa"),
        tiny_config(tmp_path, max_steps=1, packing="prefix_shared"),
        train_dataset=tiny_pairs(),
        processing_class=TOKENIZER,
        data_collator=PairCollator(TOKENIZER.pad_token_id),
    )
    assert trainer.pipeline.packing is None
    trainer.train()


def test_a_trained_model_generates_as_before(tmp_path):
    model = model_with("sdpa")
    tiny_trainer(tmp_path, model, max_steps=1, learning_rate=0.0).train()
    prompt = torch.tensor([[0, 5, 6]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    fresh = model_with("sdpa").generate(prompt, **settings)
    assert torch.equal(model.eval().generate(prompt, **settings), fresh)


def test_unknown_values_are_refused(tmp_path):
    with pytest.raises(UserError, match="packing: expected one of padded, packed"):
        tiny_config(tmp_path, packing="shared")


@pytest.mark.costly
def test_prompts_count_in_the_likelihood_the_same_in_every_layout(tmp_path):
    """Beside pairs of one prompt, whose prompt is scored once and counts for each."""
    found = {}
    for packing in ("padded", "packed", "prefix_shared"):
        for nll in ("tokens", "prompt_and_answer"):
            trainer = PreferenceTrainer(
                tiny_model(),
                tiny_config(
                    tmp_path,
                    objective="orpo",
                    objective_args={"nll": nll},
                    packing=packing,
                    group_by_prompt=True,
                ),
                train_dataset=concatenate_datasets([tiny_pairs(6), tiny_pairs(6).map(swapped)]),
                processing_class=TOKENIZER,
            )
            trainer.train()
            found[packing, nll] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    for (_, nll), losses in found.items():
        assert losses == pytest.approx(found["padded", nll], rel=1e-5)
    assert found["padded", "tokens"] != pytest.approx(
        found["padded", "prompt_and_answer"], rel=0.01
    )


def swapped(row: dict[str, str]) -> dict[str, str]:
    return {"chosen": row["rejected"], "rejected": row["chosen"]}
