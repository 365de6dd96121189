"""A reference that follows the policy, and its checkpoints."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import TrainerCallback
from widemargin.trainer.errors import UserError
from widemargin.trainer.reference.source import REFERENCE_FILE

from tests.support.reference_runs import LORA, ONCE, dpo_trainer, losses, trained
from tests.support.tiny_models import parameters_of, tiny_model

SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}


class Followed(TrainerCallback):
    """The policy's and the reference's weights after each step, and each sync."""

    def __init__(self, trainer):
        self.trainer, self.policy, self.reference = trainer, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.policy.append(parameters_of(self.trainer.model))
        self.reference.append(parameters_of(self.trainer.reference.model))


@pytest.mark.costly
def test_every_few_steps_it_moves_towards_the_policy(tmp_path):
    trainer = dpo_trainer(tmp_path, max_steps=5, logging_steps=1, learning_rate=1e-2, **SYNCED)
    followed = Followed(trainer)
    trainer.add_callback(followed)
    expected = parameters_of(trainer.reference.model)
    trainer.train()
    for step, (policy, reference) in enumerate(
        zip(followed.policy, followed.reference, strict=True), start=1
    ):
        if step % 2 == 0:
            expected = 0.6 * policy + 0.4 * expected
        torch.testing.assert_close(reference, expected)
    fixed = trained(tmp_path / "fixed", max_steps=5, logging_steps=1, learning_rate=1e-2)
    assert losses(trainer)[:2] == losses(fixed)[:2]
    assert losses(trainer)[2:] != losses(fixed)[2:]


@pytest.mark.costly
def test_a_resumed_run_goes_on_with_the_reference_it_had(tmp_path):
    run = {"max_steps": 5, "logging_steps": 1, "learning_rate": 1e-2, **SYNCED}
    run |= {"save_strategy": "steps", "save_steps": 3}
    uninterrupted = trained(tmp_path, **run)
    resumed = dpo_trainer(tmp_path, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in ((uninterrupted, resumed), (uninterrupted.reference, resumed.reference)):
        assert torch.equal(parameters_of(one.model), parameters_of(other.model))
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "copy")
    (tmp_path / "copy" / REFERENCE_FILE).unlink()
    with pytest.raises(UserError, match=REFERENCE_FILE.replace(".", r"\.")):
        dpo_trainer(tmp_path, **run).train(resume_from_checkpoint=str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ONCE, "train without an adapter, precompute_ref_log_probs"),
        (LORA, "train without an adapter"),
        ({"objective": "simpo"}, "simpo has no reference"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: expected a whole number from 1 on"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha: expected a number above 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_what_cannot_follow_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        dpo_trainer(tmp_path, model=tiny_model(), **SYNCED | settings)
