"""`CheckpointedTrainer`: transformers' loop with complete checkpoints, of the right run."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..checkpoint.files import (
    STAGING,
    could_not_write,
    newest_complete,
    publish,
    rotate,
    run_of,
    write_manifest,
)
from ..checkpoint.resume import Start, check_same_run, on_first_rank, output_claimed, start_of_run
from ..checkpoint.same_run import Facts, agreed_facts, run_facts
from ..errors import UserError, refusals
from ..model.digest import frozen_digest
from ..text import steady_console
from .nonfinite import check_weights
from .progress import EpochEnd, Progress, follow_schedule
from .stopping import Collapsed, CollapseGuard, Preempted, Preemption, Stopped
from .watchdog import Watchdog, missing_ranks

if TYPE_CHECKING:
    from ..batching.pipeline import PairPipeline
    from ..objectives import Objective
    from ..reference.source import SyncedReference

OBJECTIVE_FILE = "objective.safetensors"

logger = logging.getLogger(__name__)


class CheckpointedTrainer(Trainer):
    """Saves, resumes, and stops at SIGTERM with a checkpoint; see `checkpoint` and `stopping`.

    A checkpoint that cannot be written, as on a full disk, is removed and warned of, and training
    goes on; the checkpoints before it stay as they are.

    Attributes:
        last_saved: the last checkpoint of this process.
    """

    objective: Objective
    pipeline: PairPipeline
    preemption: Preemption
    collapse: CollapseGuard
    last_saved: Path | None = None
    _staging: Path | None = None
    _save_problem: str | None = None
    _to_push: str | None = None
    _facts: Facts | None = None
    _progress: Progress
    synced: SyncedReference | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preemption, self.collapse = Preemption(self), CollapseGuard()
        for each in (self.preemption, self.collapse, EpochEnd(self)):
            self.add_callback(each)

    def train(
        self, resume_from_checkpoint: str | bool | Start | None = None, *args: Any, **kwargs: Any
    ):
        """As transformers', from a checkpoint that is complete and belongs to this run.

        Args:
            resume_from_checkpoint: as in `choose_checkpoint`, or what `start_of_run` gave.
            args, kwargs: transformers' own.

        Raises:
            UserError: no such checkpoint, one that is broken or of another run, or a step whose
                loss or gradient is not finite.
            Stopped: SIGTERM came (`Preempted`) or the run collapsed (`Collapsed`); it was saved.
        """
        with missing_ranks(self.args), output_claimed(self.args):
            start = resume_from_checkpoint
            if not isinstance(start, Start):
                start = start_of_run(self.args, start)
            self._facts = facts = self._run_facts() | {"id": start.run, "started": time.time()}
            folder = start.folder
            if folder is not None:
                on_first_rank(self.args, lambda: check_same_run(folder, facts))
            checkpoint = None if folder is None else str(folder)
            self._progress = Progress(self, folder)
            result = self._train_from(checkpoint, *args, **kwargs)
            if folder is not None and folder.name == f"checkpoint-{result.global_step}":
                longer = "max_steps" if self.args.max_steps > 0 else "num_train_epochs"
                logger.warning(
                    f"{folder} is the end of its run, so nothing was left to train; raise {longer} "
                    "to go on, or set resume_from_checkpoint: false to start again"
                )
            return result

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        listening, watchdog = self.preemption.listening(), Watchdog(self)
        reading = refusals(f"resume_from_checkpoint: {checkpoint}: cannot be read", UnpicklingError)
        with steady_console(), listening, watchdog, watchdog.naming(), reading:
            result = super().train(checkpoint, *args, **kwargs)
            check_weights(self)
        if self.stopping:
            raise self._stopped()
        return result

    @property
    def stopping(self) -> bool:
        """Whether the run is to be saved and to end after this step."""
        return self.preemption.stopping or self.collapse.stopping

    def _stopped(self) -> Stopped:
        step, saved, problem = self.state.global_step, self.last_saved, self._save_problem
        if problem is None and (saved is None or saved.name != f"checkpoint-{step}"):
            problem = "no checkpoint of this step was asked for"
        place, quiet = (step, saved, problem), self.args.process_index > 0
        if self.preemption.stopping:
            return Preempted(*place, quiet=quiet)
        return Collapsed(self.collapse.watch.signs.values(), *place, quiet=quiet)

    def last_checkpoint(self) -> Path | None:
        """The run's newest checkpoint in ``output_dir`` whose files are there in their sizes."""
        folder, run = Path(str(self.args.output_dir)), (self._facts or {}).get("id")
        return newest_complete(folder, run=run, hashes=False)[0]

    def _run_facts(self) -> Facts:
        """On all ranks what the first one finds; a collective with several ranks."""
        rows: Any = self.train_dataset
        args: Any = self.args
        facts = agreed_facts(args, self.objective, rows, self.eval_dataset)
        frozen = frozen_digest(self.model, self.args.process_index == 0)  # pyright: ignore[reportArgumentType]
        return on_first_rank(
            self.args, lambda: run_facts(self, facts, rows, self.pipeline.layout, frozen)
        )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_weights(self)
        run_dir = Path(self._get_output_dir(trial))
        step, best_before = self.state.global_step, self.state.best_model_checkpoint
        folder, staging = run_dir / f"checkpoint-{step}", run_dir / f"{STAGING}{step}"
        self._save_problem = self._to_push = None
        self._attempt(lambda: self._make_room(staging))
        if self._gather_problem() is None:  # and no rank writes where another still clears
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:
                self._note_problem(error)
            finally:
                self._staging = None
            self._name_best(run_dir, staging / folder.name)
        facts = (self._facts or {}) | {"progress": self._progress.facts()}
        if self._gather_problem() is None and self.args.should_save:
            self._attempt(lambda: write_manifest(staging / folder.name, step, facts))
            if self._save_problem is None:
                self._attempt(lambda: publish(staging, folder))
        if self._gather_problem() is None:
            self.last_saved = folder
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                keep = [folder] + ([Path(best)] if best else [])
                self._attempt(lambda: rotate(run_dir, self.args.save_total_limit, keep))
            if self._to_push is not None:
                super()._push_from_checkpoint(str(folder))
            return
        self.state.best_model_checkpoint = best_before
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        if self.args.process_index == 0:
            logger.warning(
                "Step %d: the checkpoint could not be saved: %s. Training goes on; %s",
                *(step, self._save_problem, _latest(self.last_checkpoint())),
            )

    def _make_room(self, staging: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _name_best(self, run_dir: Path, written: Path | None = None) -> None:
        """transformers looks for the best checkpoint in the staging folder, or where it once was.

        Another run's of the same step, as in a folder that is used again, is not it.
        """
        best, run = self.state.best_global_step, (self._facts or {}).get("id")
        if not best or self._save_problem is not None:
            return
        folder = run_dir / f"checkpoint-{best}"
        if (written and written.name == folder.name) or (run and run_of(folder) == run):
            self.state.best_model_checkpoint = str(folder)
        if written and self.args.should_save:
            self._attempt(lambda: self.state.save_to_json(str(written / TRAINER_STATE_NAME)))

    def _note_problem(self, error: Exception) -> None:
        if not could_not_write(error):
            raise error
        self._save_problem = self._save_problem or " ".join(str(error).split())[:300]

    def _attempt(self, work: Callable[[], Any]) -> None:
        """Do what concerns this rank alone; if it cannot write, every rank hears of it later."""
        try:
            work()
        except Exception as error:
            self._note_problem(error)

    def _gather_problem(self) -> str | None:
        """Give every rank the problem of the first rank that has one; a collective."""
        if self.args.world_size > 1:
            problems: list[str | None] = [None] * self.args.world_size
            dist.all_gather_object(problems, self._save_problem)
            self._save_problem = next((p for p in problems if p is not None), None)
        return self._save_problem

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, config and tokenizer; not the pickled settings, which hold the hub's token."""

        def write() -> None:
            super(CheckpointedTrainer, self)._save(output_dir, state_dict)
            if self.args.should_save:
                folder = Path(output_dir or str(self.args.output_dir))
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

        if self._staging is None:
            write()
        else:  # no rank waits inside, so a rank that fails must not leave the others waiting later
            self._attempt(write)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = super()._save_optimizer_and_scheduler
        if self._staging is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            save(output_dir)
        else:
            self._attempt(lambda: save(output_dir))
        state = self.objective.state_dict()
        if state and self.args.should_save:
            tensors = {name: value.cpu().contiguous() for name, value in state.items()}
            save_file(tensors, Path(output_dir) / OBJECTIVE_FILE)
        if self.synced is not None and self.args.should_save:
            self.synced.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        follow_schedule(self.lr_scheduler)
        if self.synced is not None:
            self.synced.load(checkpoint)
        if (path := Path(checkpoint) / OBJECTIVE_FILE).is_file():
            self.objective.load_state_dict(load_file(path))
        elif self.objective.state_dict():
            raise UserError(
                f"checkpoint {checkpoint}: it has no {OBJECTIVE_FILE}, which "
                f"{self.objective.name} needs to go on; was it saved with another objective?"
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Only once it has its name."""
        self._to_push = checkpoint_folder

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers would make one more step where the checkpoint was of the last one."""
        self._progress.restore()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Save a run that must stop, also where only the best is saved."""
        return super()._determine_best_metric(metrics, trial) or self.stopping

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """With save_total_limit: 1 transformers leaves the best alone, from which none goes on."""
        self._name_best(Path(self._get_output_dir(trial)))
        best = self.state.best_model_checkpoint
        if self.stopping:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(trial, num_train_samples, self._progress.began_at())
        finally:
            self.state.best_model_checkpoint = best


def _latest(checkpoint: Path | None) -> str:
    return "there is none before it" if checkpoint is None else f"{checkpoint} is complete"
