"""Training on prompts with images: layouts alike, references, adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data.table.columns import tokens_digest
from widemargin.trainer.errors import UserError
from widemargin.trainer.model import images as model_images
from widemargin.trainer.train import train

from tests.support.tiny_images import (
    image_model,
    image_pairs,
    image_processor,
    image_rows,
)
from tests.support.tiny_models import parameters_of, tiny_config, tiny_model
from tests.support.two_ranks import trained_alike

pytestmark = pytest.mark.usefixtures("own_cache")

LIMITS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "max_prompt_length": 64, "max_length": 128,
}  # fmt: skip


def trainer(folder: Path, family: str = "llava", model: Any = None, **settings: Any) -> Any:
    pairs = settings.pop("pairs", None)
    return PreferenceTrainer(
        model or image_model(family),
        tiny_config(folder, **LIMITS | settings),
        train_dataset=pairs or image_pairs(),
        processing_class=image_processor(family),
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_layouts_train_alike_and_the_tower_too(tmp_path, family):
    learnt = {}
    for packing in ("auto", "packed", "padded"):
        run = trainer(tmp_path, family, packing=packing)
        assert run.pipeline.layout == {"auto": "prefix_shared"}.get(packing, packing)
        run.train()
        learnt[packing] = parameters_of(run.model)
    fresh = image_model(family)
    moved = (learnt["padded"] - parameters_of(fresh)).norm()
    for packing in ("auto", "packed"):
        assert (learnt[packing] - learnt["padded"]).norm() / moved < 1e-4
    tower = {name for name, _ in fresh.named_parameters() if "visual" in name or "vision" in name}
    before = dict(fresh.named_parameters())
    after = dict(run.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in tower)


def test_gemma3_trains_padded_and_says_why(tmp_path):
    run = trainer(tmp_path, "gemma3")
    assert "tokens of an image see later ones" in str(run.pipeline.packing)
    run.train()
    run.save_model()
    assert (tmp_path / "processor_config.json").is_file()  # that of the trainer's own processor
    with pytest.raises(UserError, match="packing: set padded, or auto"):
        trainer(tmp_path, "gemma3", packing="prefix_shared")


def test_dpo_with_a_reference_beforehand_and_beside(tmp_path):
    losses = []
    for early in (False, True):
        run = trainer(tmp_path, objective="dpo", precompute_ref_log_probs=early)
        run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(0.6931, abs=1e-3)


def test_a_cached_reference_belongs_to_its_images(tmp_path):
    rows = image_rows()
    swapped = [row | {"images": rows[i - 2]["images"]} for i, row in enumerate(rows)]
    swapped[1], swapped[3] = rows[1], rows[3]
    digests = [
        tokens_digest(trainer(tmp_path, pairs=Dataset.from_list(it)).train_dataset)
        for it in (rows, swapped, rows)
    ]
    assert digests[0] == digests[2] != digests[1]


def test_lora_leaves_the_tower_alone(tmp_path):
    run = trainer(tmp_path, "qwen3_vl", use_peft=True, learning_rate=1.0)
    run.train()
    adapted = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert adapted
    assert not any("visual" in name for name in adapted)


def test_an_adapters_folder_has_the_processor(tmp_path):
    """Without it, the adapter could neither go on learning nor be evaluated on images."""
    base = tmp_path / "base"
    image_model("llava").save_pretrained(base)
    image_processor("llava").save_pretrained(base)
    args = tiny_config(tmp_path / "run", use_peft=True, **LIMITS)
    PreferenceTrainer(str(base), args, train_dataset=image_pairs()).save_model()
    again = tiny_config(tmp_path / "again", **LIMITS)
    PreferenceTrainer(str(tmp_path / "run"), again, train_dataset=image_pairs()).train()
    assert AutoProcessor.from_pretrained(tmp_path / "run").image_processor is not None


def test_a_tower_sees_the_image_of_a_tree_once(tmp_path):
    """Once for several answers; the same text with another image is another tree."""
    listed = [
        {name: row[name] for name in ("images", "prompt")}
        | {"completions": ["yes", "no", "maybe"], "scores": [3.0, 2.0, float(i == 0)]}
        for i, row in enumerate(image_rows(1) * 2)
    ]
    listed[1]["images"] = image_rows(4)[2]["images"]
    run = trainer(tmp_path, pairs=Dataset.from_list(listed), per_device_train_batch_size=4)
    rows = run.train_dataset
    assert rows.trees.tree.tolist() in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0])
    batch = run.data_collator(rows.__getitems__([0, 1, 2, 3]))
    assert len(batch["pixel_values"]) == 2
    assert batch["image_index"] == [0, 1]
    run.train()


def test_kto_gives_a_neighbours_answer_its_own_prompts_image(tmp_path):
    rows = [
        {
            **{name: row[name] for name in ("images", "prompt")},
            "completion": row[side],
            "label": good,
        }
        for row in image_rows(2)
        for side, good in (("chosen", True), ("rejected", False))
    ]
    run = trainer(
        tmp_path, pairs=Dataset.from_list(rows), objective="kto",
        objective_args={"kl_estimate": "mismatched"}, per_device_train_batch_size=4,
    )  # fmt: skip
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.5, abs=0.2)


def test_checkpointing_and_half_precision(tmp_path):
    run = trainer(tmp_path, "qwen3_vl", gradient_checkpointing=True, bf16=True)
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.costly
def test_two_ranks_equal_one(tmp_path, monkeypatch):
    image_model("llava").save_pretrained(tmp_path / "model")
    image_processor("llava").save_pretrained(tmp_path / "model")
    settings = "objective: lmpo, learning_rate: 0.05, max_steps: 2, max_length: 128"
    trained_alike(tmp_path, monkeypatch, image_pairs(8), settings)


def test_evaluation_sees_images(tmp_path):
    run = PreferenceTrainer(
        image_model("llava"), tiny_config(tmp_path, **LIMITS), eval_dataset=image_pairs(),
        train_dataset=image_pairs(), processing_class=image_processor("llava"),
    )  # fmt: skip
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(run.evaluate(image_pairs())["eval_loss"])


def test_what_does_not_go_with_images_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="eval_samples: set it to 0"):
        PreferenceTrainer(
            image_model("llava"), tiny_config(tmp_path, eval_samples=2, eval_strategy="steps"),
            eval_dataset=image_pairs(), train_dataset=image_pairs(),
            processing_class=image_processor("llava"),
        )  # fmt: skip
    with pytest.raises(UserError, match="the model is of the kind llama, the processor for llava"):
        trainer(tmp_path, model=tiny_model(vocab_size=512))
    prompts_too = {"objective": "orpo", "objective_args": {"nll": "prompt_and_answer"}}
    with pytest.raises(UserError, match="nll: take one of answers alone"):
        trainer(tmp_path, **prompts_too)
    monkeypatch.setattr(model_images, "_repeated", lambda features, index: features[::-1])
    with pytest.raises(UserError, match="other log-probs than its own logits"):
        trainer(tmp_path)


def test_a_run_by_name_goes_on_from_a_checkpoint_as_if_nothing_was(tmp_path):
    """The folder's own processor is found, and stands beside the trained model."""
    image_model("llava").save_pretrained(tmp_path / "model")
    image_processor("llava").save_pretrained(tmp_path / "model")
    image_pairs(6).to_parquet(tmp_path / "pairs.parquet")
    settings: dict[str, Any] = LIMITS | {
        "model_name_or_path": str(tmp_path / "model"), "dataset": str(tmp_path / "pairs.parquet"),
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "objective": "dpo",
    }  # fmt: skip
    weights = {}
    for name, steps in (("whole", 4), ("halved", 2), ("halved", 4)):
        config = tiny_config(tmp_path / name, **settings | {"max_steps": steps})
        config.resume_from_checkpoint = "auto"
        train(config)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["whole"] == weights["halved"]
    assert (tmp_path / "whole" / "processor_config.json").is_file()
