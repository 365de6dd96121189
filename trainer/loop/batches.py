"""`BatchedTrainer`: which pairs transformers' loop gets, in which micro-batch, on which rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..batching.pipeline import PairBatches
from ..batching.streams import check_same_shard
from ..batching.workers import sheltered
from ..data.table import PairRows
from ..errors import UserError
from ..parallel.groups import data_group

if TYPE_CHECKING:
    from ..batching.pipeline import PairPipeline
    from ..objectives import Objective
    from ..reference.model import Reference
    from ..settings.config import PreferenceConfig


class BatchedTrainer(Trainer):
    """Deals pairs over steps, micro-batches and ranks as its pipeline plans them."""

    args: PreferenceConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    pipeline: PairPipeline
    objective: Objective
    reference: Reference | None
    _train_batches: PairBatches | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EveryEpochsOrder(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', from the first shard of a stream on."""
        if self.train_dataset is None:
            raise UserError("train_dataset: give one to train on; this trainer can only evaluate")
        if not isinstance(self.train_dataset, PairRows):
            raise UserError(
                "train_dataset: make a PreferenceTrainer with it; one that was put in place of the "
                "first is neither tokenized nor checked"
            )
        self.pipeline.rewind(self.train_dataset)
        return super().train(*args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: rows, reference and checks belong to one model and its settings."""
        raise UserError(
            "hyperparameter_search: make a PreferenceTrainer for each trial, or use the command "
            "widemargin sweep; one trainer has one model and one set of settings"
        )

    def get_train_dataloader(self) -> Any:
        return sheltered(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As transformers', of another data set too, raw or tokenized."""
        of_run: Any = self.eval_dataset
        is_own = eval_dataset is None or eval_dataset is of_run
        by_name = isinstance(eval_dataset, str) and isinstance(of_run, dict)
        if is_own or (by_name and eval_dataset in of_run):
            self.eval_dataset = self._evaluation_rows(of_run)
            return sheltered(super().get_eval_dataloader(None if is_own else eval_dataset))
        rows = self._later_rows(eval_dataset)
        workers_stay = self.args.dataloader_persistent_workers
        try:  # workers that stay would be found again for every other data set
            self.args.dataloader_persistent_workers = False
            return sheltered(super().get_eval_dataloader(rows))
        finally:
            self.args.dataloader_persistent_workers = workers_stay

    def _evaluation_rows(self, of_run: Any) -> Any:
        """The trainer's own, tokenized if they were assigned since it was made."""
        if isinstance(of_run, dict):
            return {name: self._evaluation_rows(part) for name, part in of_run.items()}
        prepared = of_run is None or isinstance(of_run, PairRows)
        return of_run if prepared else self._later_rows(of_run)

    def _later_rows(self, dataset: Any) -> Any:
        rows = self.pipeline.later_rows(dataset)
        if self.reference is not None:
            self.reference.precompute_later(rows, self)
        return rows

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As transformers', for `predict`: of pairs raw or tokenized."""
        return self.get_eval_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairBatches:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        self._train_batches = self.pipeline.training_batches(rows)
        return self._train_batches

    def _get_eval_sampler(self, eval_dataset: Any) -> PairBatches:
        return self.pipeline.evaluation_batches(eval_dataset)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs per step, also where ``max_tokens_per_micro_batch`` raised the accumulation."""
        return args.pairs_per_step

    def floating_point_ops(self, inputs: Any) -> int:
        """This rank's, of the rows that it shares with others."""
        return int(super().floating_point_ops(inputs)) // self.args.sequence_parallel_size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs (or prompts, where they have a loss) of this step over all ranks, on the device."""
        items = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batch_samples:
            items += self.objective.count(batch).to(device)
        if self.args.world_size > 1:
            dist.all_reduce(items, group=data_group(self.args))
        return items

    def _coupled_ranks(self) -> Any:
        """The ranks whose pairs the objective couples; None where it has this rank's alone."""
        if self.args.data_parallel_size == 1 or not self.objective.couples_pairs:
            return None
        return data_group(self.args) or dist.group.WORLD

    def _max_pairs_per_rank(self, training: bool) -> int | None:
        """A bound that all ranks know without asking each other; None where there is no plan."""
        if not training:  # one rank may get all of a micro-batch
            return self.args.eval_batch_size * self.args.data_parallel_size
        return None if self._train_batches is None else self._train_batches.max_pairs_per_rank


class _EveryEpochsOrder(TrainerCallback):
    """transformers' own `set_epoch` misses the sampler after a resume on several ranks."""

    def __init__(self, trainer: BatchedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._train_batches is not None:
            self.trainer._train_batches.set_epoch(int(state.epoch or 0))
            check_same_shard(args, self.trainer.train_dataset)
