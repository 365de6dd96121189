"""`ResumableTrainer`: transformers' loop with whole checkpoints, and steps that are sound."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..batching.workers import sheltered
from ..checkpoint.files import (
    ASIDE,
    choose_checkpoint,
    could_not_write,
    newest_complete,
    publish,
    rotate,
    settle_leftovers,
)
from ..checkpoint.manifest import check_files, write_manifest
from ..checkpoint.same_run import compare, run_facts
from ..errors import UserError
from .guards import Guards, Preempted
from .watchdog import Watchdog

if TYPE_CHECKING:
    from ..trainer import PreferenceTrainer

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """What `PreferenceTrainer` does to survive: see `checkpoints`, `resuming`, `guards`.

    A checkpoint that cannot be written, as on a full disk, is removed and warned of, and training
    goes on; the checkpoints before it stay as they are.
    """

    guards: Guards
    _aside: Path | None = None
    _save_problem: str | None = None
    _to_push: str | None = None
    _facts: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guards = Guards(self)
        self.add_callback(self.guards)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As transformers', from a checkpoint that is whole and belongs to this run.

        Args:
            resume_from_checkpoint: as in `choose_checkpoint`.
            args, kwargs: transformers' own.

        Raises:
            UserError: no such checkpoint, one that is broken or of another run, or a step whose
                loss or gradient is not finite.
            Preempted: SIGTERM came; a checkpoint was saved.
        """
        checkpoint = self._on_main(lambda: self._checkpoint(resume_from_checkpoint))
        with self.guards.listening(), Watchdog(self) as watchdog, watchdog.naming():
            result = super().train(checkpoint, *args, **kwargs)
        if self.guards.stopping:
            step, saved = self.state.global_step, self.guards.saved
            problem = self._save_problem
            if problem is None and (saved is None or saved.name != f"checkpoint-{step}"):
                problem = "no checkpoint of this step was asked for"
            raise Preempted(
                step,
                saved,
                problem,
                quiet=self.args.process_index > 0,
            )
        return result

    def get_train_dataloader(self) -> Any:
        return sheltered(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return sheltered(super().get_eval_dataloader(eval_dataset))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint in ``output_dir`` whose files are there in their sizes."""
        return newest_complete(Path(self._own_output_dir), hashes=False)[0]

    def _checkpoint(self, wanted: str | bool | None) -> str | None:
        settle_leftovers(Path(self._own_output_dir))
        folder = choose_checkpoint(wanted, self._own_output_dir)
        if folder is None:
            return None
        if (folder / "manifest.json").is_file():
            saved = check_files(folder, hashes=False)["run"]
            forbidden, notes = compare(saved, self._run_facts())
            if forbidden:
                raise UserError(
                    f"resume_from_checkpoint: {folder} is of another run: {'; '.join(forbidden)}. "
                    "Set what it was, or start a new run from its weights: model_name_or_path: "
                    f"{folder}, without resume_from_checkpoint"
                )
            for note in notes:
                logger.warning("Going on from %s: %s", folder, note)
        return str(folder)

    def _run_facts(self) -> dict[str, Any]:
        if self._facts is None:
            trainer: PreferenceTrainer = self  # pyright: ignore[reportAssignmentType]
            self._facts = run_facts(trainer)
        return self._facts

    def _on_main(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the first rank, or its ``UserError``, on every rank."""
        outcome: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        if self.args.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    @property
    def _own_output_dir(self) -> str:
        return str(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        step = self.state.global_step
        folder, aside = run_dir / f"checkpoint-{step}", run_dir / f"{ASIDE}{step}"
        best_before = self.state.best_model_checkpoint
        self._save_problem = self._to_push = None
        self._locally(lambda: self._make_room(aside))
        if self._agreed_problem() is None:  # and no rank writes where another still clears
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:
                self._note_problem(error)
            finally:
                self._aside = None
            self._name_best(run_dir, aside / folder.name)
        if self._agreed_problem() is None and self.args.should_save:
            self._locally(lambda: write_manifest(aside / folder.name, step, self._run_facts()))
            if self._save_problem is None:
                self._locally(lambda: publish(aside, folder))
        if self._agreed_problem() is None:
            self.guards.saved = folder
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                keep = [folder] + ([Path(best)] if best else [])
                self._locally(lambda: rotate(run_dir, self.args.save_total_limit, keep))
            if self._to_push is not None:
                super()._push_from_checkpoint(str(folder))
            return
        self.state.best_model_checkpoint = best_before
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        if self.args.process_index == 0:
            logger.warning(
                "Step %d: the checkpoint could not be saved: %s. Training goes on; %s",
                *(step, self._save_problem, _whole(self.last_checkpoint())),
            )

    def _make_room(self, aside: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _name_best(self, run_dir: Path, written: Path) -> None:
        """transformers looks for the best checkpoint beside this one, which is still aside."""
        best = self.state.best_global_step
        if not best or self._save_problem is not None:
            return
        name = f"checkpoint-{best}"
        if name == written.name or (run_dir / name).is_dir():
            self.state.best_model_checkpoint = str(run_dir / name)
        if self.args.should_save:
            self._locally(lambda: self.state.save_to_json(str(written / TRAINER_STATE_NAME)))

    def _note_problem(self, error: Exception) -> None:
        if not could_not_write(error):
            raise error
        self._save_problem = self._save_problem or " ".join(str(error).split())[:300]

    def _locally(self, work: Callable[[], Any]) -> None:
        """Do what concerns this rank alone; if it cannot write, every rank hears of it later."""
        try:
            work()
        except Exception as error:
            self._note_problem(error)

    def _agreed_problem(self) -> str | None:
        """The first rank's problem that has one, on all ranks."""
        if self.args.world_size > 1:
            problems: list[str | None] = [None] * self.args.world_size
            dist.all_gather_object(problems, self._save_problem)
            self._save_problem = next((p for p in problems if p is not None), None)
        return self._save_problem

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, config and tokenizer; not the pickled settings, which hold the hub's token."""

        def write() -> None:
            super(ResumableTrainer, self)._save(output_dir, state_dict)
            if self.args.should_save:
                folder = Path(output_dir or self._own_output_dir)
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

        if self._aside is None:
            write()
        else:  # no rank waits inside, so a rank that fails must not leave the others waiting later
            self._locally(write)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = super()._save_optimizer_and_scheduler
        if self._aside is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            save(output_dir)
        else:
            self._locally(lambda: save(output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Only once it has its name."""
        self._to_push = checkpoint_folder

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers would make one more step where the checkpoint was of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Where only the best is saved, a run that is told to stop is saved too."""
        return super()._determine_best_metric(metrics, trial) or self.guards.stopping

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """With save_total_limit: 1 transformers leaves the best alone, from which none goes on."""
        best = self.state.best_model_checkpoint
        if self.guards.stopping:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.guards.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guards.norm


def _whole(checkpoint: Path | None) -> str:
    return "there is none before it" if checkpoint is None else f"{checkpoint} is whole"
