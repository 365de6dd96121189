"""Guards: steps that are not finite, SIGTERM, ranks that hang; on one process and on two."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from widemargin.trainer.checkpoint.files import choose_checkpoint, newest_complete
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.stopping import Preempted

from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)
from tests.support.two_ranks import launch

SETTINGS: dict[str, Any] = {
    "objective": "lmpo", "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4,
    "pairs": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
}  # fmt: skip


def poisoned(trainer: Any, step: int, *, loss: bool, value: float = float("nan")) -> Any:
    """The trainer, with the loss or the gradients of one step (counted from 1) spoilt."""
    compute = trainer.compute_loss

    def spoilt(model, inputs, *args, **kwargs):
        if trainer.state.global_step + 1 != step or not model.training:
            return compute(model, inputs, *args, **kwargs)
        if not loss:
            result = compute(model, inputs, *args, **kwargs)
            result.register_hook(lambda grad: grad * value)
            return result
        weight = trainer.model.lm_head.weight
        before = weight.data.clone()
        weight.data[:] = value
        result = compute(model, inputs, *args, **kwargs)
        weight.data.copy_(before)
        return result

    trainer.compute_loss = spoilt
    return trainer


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_update(tmp_path, loss, clip):
    settings = SETTINGS | {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": clip}
    before = tiny_trainer(tmp_path / "before", **settings | {"max_steps": 2})
    before.train()
    trainer = poisoned(tiny_trainer(tmp_path, **settings), 3, loss=loss)
    with pytest.raises(UserError, match=r"Step 3: .*pairs [\d, ]+ of train_dataset") as raised:
        trainer.train()
    message = str(raised.value)
    assert ("the loss is nan" in message) == loss
    assert ("the gradient's norm" in message) != loss
    assert str(tmp_path / "checkpoint-2") in message
    named = message.split("pairs ")[1].split(" of train_dataset")[0]
    pairs = trainer._train_batches.plan
    step = [pair for batch in (4, 5) for pair in pairs.share(batch, 0)]
    assert [int(pair) for pair in named.split(", ")] == sorted(step)
    assert torch.equal(parameters_of(trainer.model), parameters_of(before.model))


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
def test_steps_are_passed_over_when_told_to(tmp_path, caplog, loss):
    """No update, no trace in the objective's statistics or the loss, and the next step is fine."""
    trainer = poisoned(tiny_trainer(tmp_path, **SETTINGS, max_nonfinite_steps=1), 2, loss=loss)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            state = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
            moments = trainer.optimizer.state_dict()["state"][0]
            seen.append((parameters_of(trainer.model), state, moments["exp_avg"].clone()))

    trainer.add_callback(Look())
    result = trainer.train()
    assert "passed over (1 of 1)" in caplog.text
    for one, two in zip(*(seen[i] for i in (0, 1)), strict=True):
        assert_same(one, two)
    assert not torch.equal(seen[1][0], seen[2][0])
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert result.global_step == 4
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(logged) == 3  # not the step passed over
    assert all(abs(entry["rewards/margins"]) < float("inf") for entry in logged)


def assert_same(one, two) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    else:
        assert torch.equal(one, two)


def test_more_than_allowed(tmp_path):
    trainer = poisoned(tiny_trainer(tmp_path, **SETTINGS, max_nonfinite_steps=1), 2, loss=False)
    poisoned(trainer, 3, loss=False)
    with pytest.raises(UserError, match=r"Step 3: .*after 1 steps passed over"):
        trainer.train()


def test_one_read_per_step_and_none_per_micro_batch(tmp_path, monkeypatch):
    """Of what the guards ask; the loop itself reads when it logs."""
    reads = []
    item = torch.Tensor.item

    def counted(tensor):
        caller = sys._getframe(1).f_code.co_filename
        reads.append(Path(caller).name)
        return item(tensor)

    trainer = tiny_trainer(tmp_path, **SETTINGS | {"logging_steps": 100})
    monkeypatch.setattr(torch.Tensor, "item", counted)
    trainer.train()
    assert reads.count("stopping.py") == 4


@pytest.mark.costly
def test_sigterm_saves_and_a_resumed_run_ends_the_same(tmp_path):
    """Stopped twice: during a step, and during an evaluation."""
    settings = SETTINGS | {"eval_pairs": 4, "eval_strategy": "steps", "eval_steps": 3}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    handler = signal.getsignal(signal.SIGTERM)
    for place, steps in (("on_substep_end", [2, 3, 4]), ("on_prediction_step", [3])):
        folder = tmp_path / place
        for step in steps:
            trainer = tiny_trainer(
                folder, model=tiny_model(seed=step * (step != steps[0])), **settings
            )
            trainer.add_callback(terminating(place, step, times=2))
            with pytest.raises(Preempted) as stopped:
                trainer.train(resume_from_checkpoint="auto")
            assert stopped.value.code == 143
            assert newest_complete(folder)[0] == folder / f"checkpoint-{step}"
            assert f"checkpoint-{step}" in str(stopped.value)
            assert signal.getsignal(signal.SIGTERM) is handler
        trainer = tiny_trainer(folder, model=tiny_model(seed=9), **settings)
        trainer.train(resume_from_checkpoint=True)
        assert torch.equal(parameters_of(trainer.model), parameters_of(whole.model))


@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("place", ["on_substep_end", "on_prediction_step"])
def test_what_a_sigterm_saves_is_kept_beside_the_best(tmp_path, strategy, place):
    """The second evaluation is no better, and one checkpoint may stay."""
    trainer = tiny_trainer(
        tmp_path, **SETTINGS, eval_pairs=4, eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy=strategy, save_total_limit=1, metric_for_best_model="loss",
    )  # fmt: skip
    evaluate = trainer.evaluate

    def worse(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval_loss": float(trainer.state.global_step)}

    trainer.evaluate = worse
    trainer.add_callback(terminating(place, 3))
    with pytest.raises(Preempted, match=r"saved in .*checkpoint-3"):
        trainer.train()
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_outlive_a_sigterm_to_all_processes(tmp_path, persistent):
    """As schedulers send it; the parent's own still ends them, or leaving would wait for ever."""
    trainer = tiny_trainer(
        tmp_path, **SETTINGS, eval_pairs=4, eval_strategy="steps", eval_steps=1,
        dataloader_num_workers=1, dataloader_persistent_workers=persistent,
    )  # fmt: skip

    class Terminating(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                for child in multiprocessing.active_children():
                    subprocess.run(["kill", str(child.pid)], check=True)
                subprocess.run(["kill", str(os.getpid())], check=True)
                time.sleep(0.3)

    trainer.add_callback(Terminating())
    with pytest.raises(Preempted):
        trainer.train()
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(60)
        assert child.exitcode == 0


def terminating(place: str, step: int, times: int = 1) -> TrainerCallback:
    """A callback that sends this process SIGTERM, once the run is in ``step``."""

    class Terminating(TrainerCallback):
        sent = 0

    def send(self, args, state, control, **kwargs):
        if state.global_step + (place != "on_prediction_step") == step and not self.sent:
            self.sent = times
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    setattr(Terminating, place, send)
    return Terminating()


@pytest.mark.costly
def test_the_command_line_ends_with_143(tmp_path, monkeypatch, capsys):
    from widemargin.trainer.cli import main
    from widemargin.trainer.trainer import PreferenceTrainer

    train = PreferenceTrainer.train

    def stopped_in_step_2(self, *args, **kwargs):
        self.add_callback(terminating("on_substep_end", 2))
        return train(self, *args, **kwargs)

    write_run(tmp_path)
    arguments = ["train", str(tmp_path / "config.yaml"), f"--output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        patched.setattr(PreferenceTrainer, "train", stopped_in_step_2)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    assert stopped.value.code == 143
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 0
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def write_run(folder: Path) -> None:
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    tiny_pairs(13).to_json(folder / "train.jsonl")
    (folder / "config.yaml").write_text(
        f"{{model_name_or_path: {folder}/model, dataset: {folder}/train.jsonl, objective: lmpo, "
        "optim: adamw_torch, learning_rate: 0.001, head_tail: exact, max_steps: 4, "
        "gradient_accumulation_steps: 2, per_device_train_batch_size: 1, save_steps: 2, "
        "use_cpu: true, write_report: false, disable_tqdm: true, logging_steps: 1}"
    )


SCRIPT = '''
"""Runs that meet with something in step 3 of one rank; what that is, the last argument says."""

import os, signal, sys, time
from transformers import TrainerCallback
from widemargin.trainer import cli
from widemargin.trainer.trainer import PreferenceTrainer

what, rank = sys.argv.pop(), int(os.environ["RANK"])

class Mishap(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 != 3 or rank != 1:
            return
        if what == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun sends at the end
            time.sleep(60)
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if what == "nan" and rank == 1 and state.global_step == 2:
            trainer.compute_loss = lambda *a, **k: compute(*a, **k) * float("nan")

def train(self, *args, **kwargs):
    global trainer, compute
    trainer, compute = self, self.compute_loss
    self.add_callback(Mishap())
    return original(self, *args, **kwargs)

original = PreferenceTrainer.train
PreferenceTrainer.train = train
runs = [["train", "config.yaml", "--ddp_backend=gloo", *run.split()] for run in sys.argv[1:]]
sys.exit(max(map(cli.main, runs)))
'''


def two_ranks(folder: Path, what: str, *runs: str) -> subprocess.CompletedProcess[str]:
    """Each run is a string of settings; all share a launch, since starting takes longest."""
    (folder / "mishap.py").write_text(SCRIPT)
    return launch(folder, "mishap.py", *runs, what)


@pytest.mark.costly
def test_ranks_with_other_settings_are_refused(tmp_path):
    write_run(tmp_path)
    (tmp_path / "apart.py").write_text(
        "import os, sys\n"
        "from widemargin.trainer.cli import main\n"
        "sys.exit(main(['train', 'config.yaml', '--seed=' + os.environ['RANK']]))\n"
    )
    done = launch(tmp_path, "apart.py")
    assert done.returncode != 0
    assert "start every rank with the same settings" in done.stderr, done.stderr[-3000:]
    assert "seed was 0, is 1" in done.stderr


@pytest.mark.costly
def test_disks_that_ranks_do_not_share(tmp_path):
    """And machines that share one although each is to save, by LOCAL_RANK: 0 on each."""
    write_run(tmp_path)
    (tmp_path / "apart.py").write_text(
        "import os\n"
        "from widemargin.trainer.cli import main\n"
        "own, one = '--output_dir=run' + os.environ['RANK'], '--output_dir=one'\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        "statuses = [main(['train', 'config.yaml', *given]) for given in (\n"
        "    [own], [one, '--save_on_each_node=true'], [own, '--save_on_each_node=true'],\n"
        ")]\n"
        "print('statuses', statuses, os.listdir('run' + os.environ['RANK']), flush=True)\n"
    )
    done = launch(tmp_path, "apart.py")
    said = done.stdout + done.stderr
    assert said.count("ranks 1 do not see what the first rank writes in run") == 2, said[-3000:]
    assert said.count("save_on_each_node: set it to false") == 2
    assert said.count("statuses [2, 2, 0]") == 2
    assert not list(tmp_path.glob("*/.shared*"))
    for rank in "01":
        assert choose_checkpoint(True, tmp_path / f"run{rank}") is not None


@pytest.mark.costly
def test_two_ranks_agree(tmp_path):
    """SIGTERM to one rank saves on both, and the resumed run ends as the uninterrupted one."""
    write_run(tmp_path)
    stopped = two_ranks(tmp_path, "sigterm", "--output_dir=run")
    assert "stopped by SIGTERM after step 3" in stopped.stderr, stopped.stderr[-3000:]
    assert stopped.stderr.count("stopped by SIGTERM") == 1
    saved = newest_complete(tmp_path / "run")[0]
    assert saved == tmp_path / "run" / "checkpoint-3"
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {p.name for p in saved.iterdir()}
    resume = "--output_dir=run --resume_from_checkpoint=auto"
    done = two_ranks(tmp_path, "none", "--output_dir=whole", resume)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        parameters_of(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        for name in ("whole", "run")
    )
    assert (one - two).abs().max() < 1e-6


@pytest.mark.costly
def test_two_ranks_stop_at_one_rank_s_nan(tmp_path):
    write_run(tmp_path)
    done = two_ranks(tmp_path, "nan", "--output_dir=run")
    assert done.stderr.count("error: Step 3: ") == 2, done.stderr[-3000:]


@pytest.mark.costly
def test_a_rank_that_hangs_is_named(tmp_path):
    write_run(tmp_path)
    done = two_ranks(tmp_path, "hang", "--output_dir=run --ddp_timeout=10")
    assert "rank 0, step 3: a collective failed: rank 1 is still in step 3" in done.stderr, (
        done.stderr[-3000:]
    )
