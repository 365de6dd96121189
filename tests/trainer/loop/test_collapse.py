"""A collapsing run: warned of once, stopped and saved if told to, and the same when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from widemargin.trainer.checkpoint.files import newest_complete
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.stopping import Collapsed

from tests.support.tiny_models import tiny_trainer
from tests.support.two_ranks import launch

LOGGER = "widemargin.trainer.loop.stopping"


def collapsing(folder: Path, **settings: Any) -> Any:
    """A trainer whose logs say that chosen answers fall by 3 nats a token after step 10."""
    defaults = {"max_steps": 20, "save_steps": 4, "save_strategy": "steps"}
    trainer = tiny_trainer(folder, **defaults | settings)
    figures = trainer.observer.training_figures

    def faked() -> dict[str, float]:
        fallen = trainer.state.global_step > 10
        return figures() | {"logps/chosen_mean": -4.0 if fallen else -1.0}

    trainer.observer.training_figures = faked
    return trainer


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER]


def test_it_warns_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = collapsing(tmp_path, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 20
    (warning,) = warnings(caplog)
    assert "step 16: the chosen answers' log-prob fell from -1.00 to -2.80" in warning
    assert "sft_weight" in warning


def test_it_stops_saves_and_can_go_on_if_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = collapsing(tmp_path, stop_on_collapse=True, save_strategy="no")
    with pytest.raises(Collapsed, match=r"step 16: .*saved in .*checkpoint-16; Lower") as stopped:
        trainer.train()
    assert stopped.value.code == 3
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-16"
    with pytest.raises(UserError, match=r"stop_on_collapse: set it to false.*step 16"):
        collapsing(tmp_path, stop_on_collapse=True).train(resume_from_checkpoint=True)
    caplog.clear()
    trainer = collapsing(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 20
    assert warnings(caplog) == []


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = collapsing(tmp_path, max_steps=12)
    trainer.train()
    assert warnings(caplog) == []
    trainer = collapsing(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    (warning,) = warnings(caplog)
    assert "step 16: " in warning


def test_what_a_collapse_saves_is_kept_beside_the_best(tmp_path: Path) -> None:
    trainer = collapsing(
        tmp_path, stop_on_collapse=True, eval_pairs=4, eval_strategy="steps", eval_steps=8,
        save_strategy="best", save_total_limit=1, metric_for_best_model="loss",
    )  # fmt: skip
    with pytest.raises(Collapsed, match="saved in"):
        trainer.train()
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-16"


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    """By what the first rank's answers show: the other has none, and hears of it."""
    (tmp_path / "ranks.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from tests.trainer.loop.test_collapse import collapsing\n"
        "from widemargin.trainer.monitor import samples\n"
        "trainer = collapsing(Path('run'), stop_on_collapse=True, eval_pairs=4, eval_samples=2,\n"
        "    eval_strategy='steps', eval_steps=2, eval_samples_max_new_tokens=12, max_steps=8)\n"
        "samples.repetition = lambda ids: float(trainer.state.global_step > 3)\n"
        "try:\n"
        "    trainer.train()\n"
        "except SystemExit as stop:\n"
        "    print(f'rank {os.environ[\"RANK\"]}: {stop.code} at', trainer.state.global_step)\n"
    )
    done = launch(tmp_path, "ranks.py")
    for rank in "01":
        assert f"rank {rank}: 3 at 4" in done.stdout, done.stderr[-3000:]
    assert done.stderr.count("Signs of a collapse, step 4: sampled answers repeat") == 1
    assert newest_complete(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-4"
