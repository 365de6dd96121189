"""`PlannedTrainer`: which pairs transformers' loop gets, in which micro-batch, on which rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..batching.limits import fitted, training_planner
from ..batching.planner import Planner
from ..batching.sampler import PairBatches
from ..batching.summary import PlanSummary, summarise
from ..data import tokenize_pairs
from ..data.chat import pad_token
from ..data.report import SplitReport
from ..data.table import PairRows, is_tokenized
from ..packing.verify import packing_for
from .resumable import ResumableTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..objectives import Objective
    from ..packing.choose import Packing
    from ..settings.config import PreferenceConfig


class PlannedTrainer(ResumableTrainer):
    """Tokenizes pairs, and deals them over steps, micro-batches and ranks as `planner` has it."""

    objective: Objective
    data_reports: dict[str, SplitReport]
    packing: Packing | None
    _train_batches: PairBatches | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EveryEpochsOrder(self))

    def tokenize_with(
        self, tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig, vocab_size: int
    ) -> None:
        """What tokenizes pairs; before transformers' own set-up, which wants the data ready."""
        self.data_reports = {}
        self._tokenizing: dict[str, Any] = {
            "tokenizer": tokenizer,
            "settings": args,
            "vocab_size": vocab_size,
        }

    def plan_batches(
        self, model: Any, args: PreferenceConfig, collator: Any, pairs: PairRows | None
    ) -> Any:
        """The collator (the user's, or of the packing that suits), with which a step is planned."""
        self.packing = None
        if collator is None:
            self.packing = packing_for(model, args, None if pairs is None else pairs.lengths)
            collator = self.packing.collator(pad_token(self._tokenizing["tokenizer"]))
        if pairs is not None:
            layout = getattr(collator, "layout", "padded")
            planner = training_planner(args, self.objective, pairs.lengths, layout)
            fitted(args, self.objective, planner)
        return collator

    def _pairs(self, dataset: Any, name: str) -> Any:
        """A data set as the sampler reads it, tokenized if it is not yet."""
        if dataset is None or isinstance(dataset, PairRows):
            return dataset
        if is_tokenized(dataset):
            rows = PairRows(dataset)
            if "pair_id" not in dataset.column_names:  # not made, and checked, by tokenize_pairs
                rows.check(name, self._tokenizing["vocab_size"])
            return rows
        training = name == "train_dataset"
        dataset, self.data_reports[name] = tokenize_pairs(
            dataset, training=training, name=name, **self._tokenizing
        )
        return PairRows(dataset)

    def _held_out(self, dataset: Any) -> Any:
        """Data for evaluation as `_pairs` has it; several data sets by name stay a dict."""
        if not isinstance(dataset, dict):
            return self._pairs(dataset, "eval_dataset")
        return {
            name: self._pairs(part, f"eval_dataset[{name!r}]") for name, part in dataset.items()
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As transformers', of another data set too, raw or tokenized."""
        own: Any = self.eval_dataset
        by_name = isinstance(eval_dataset, str) and isinstance(own, dict) and eval_dataset in own
        if eval_dataset is None or eval_dataset is own or by_name:
            return super().get_eval_dataloader(eval_dataset)
        reports, workers_stay = dict(self.data_reports), self.args.dataloader_persistent_workers
        rows = self._pairs(eval_dataset, "eval_dataset")
        self.data_reports = reports  # which are of the run's own data
        try:  # workers that stay would be found again for every other data set
            self.args.dataloader_persistent_workers = False
            return super().get_eval_dataloader(rows)
        finally:
            self.args.dataloader_persistent_workers = workers_stay

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As transformers', for `predict`: of pairs raw or tokenized."""
        return self.get_eval_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairBatches:
        planner = self._planner(self.train_dataset if train_dataset is None else train_dataset)
        self._train_batches = PairBatches(planner, self.args.process_index)
        return self._train_batches

    def _planner(self, dataset: Any) -> Planner:
        layout = getattr(self.data_collator, "layout", "padded")
        args: Any = self.args
        return training_planner(args, self.objective, dataset.lengths, layout)

    def plan_summary(self) -> PlanSummary:
        """What the plan of the first epoch of training comes to."""
        return summarise(self._planner(self.train_dataset))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs per step, also where ``max_tokens_per_micro_batch`` raised the accumulation."""
        return args.pairs_per_step

    def _get_eval_sampler(self, eval_dataset: Any) -> PairBatches:
        args = self.args
        size = args.eval_batch_size * args.world_size
        layout = getattr(self.data_collator, "layout", "padded")
        planner = Planner(eval_dataset.lengths, size, 1, args.world_size, None, layout=layout)
        return PairBatches(planner, args.process_index)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs of this optimizer step over all ranks, as a device scalar."""
        pairs = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batch_samples:
            pairs += (batch["pair_ids"] >= 0).sum().to(device)
        if self.args.world_size > 1:
            dist.all_reduce(pairs)
        return pairs

    def _max_pairs_per_rank(self, training: bool) -> int | None:
        """A bound that all ranks know without asking each other; None where there is no plan."""
        if not training:  # one rank may get all of a micro-batch
            return self.args.eval_batch_size * self.args.world_size
        return None if self._train_batches is None else self._train_batches.max_pairs_per_rank


class _EveryEpochsOrder(TrainerCallback):
    """transformers' own `set_epoch` misses the sampler after a resume on several ranks."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._train_batches is not None:
            self.trainer._train_batches.set_epoch(int(state.epoch or 0))
