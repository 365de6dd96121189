"""`PairPipeline`: from a data set to the micro-batches of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data import tokenize_pairs
from ..data.chat import pad_token
from ..data.report import SplitReport
from ..data.table import PairRows, is_tokenized
from ..packing.verify import packing_for
from .loader import PairBatches
from .run_plan import PlanSummary, fit_micro_batches, planner_for, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..objectives import Objective
    from ..packing.choose import Packing
    from ..settings.config import PreferenceConfig
    from .planner import Planner


class PairPipeline:
    """Makes rows of data sets, a collator for them, and each rank's batches.

    Call `choose_collator` once, with the rows of training, before any batches are asked for.

    Args:
        tokenizer: for raw data sets, and the padding.
        settings: the run's. `choose_collator` may raise ``gradient_accumulation_steps``.
        vocab_size: the model's; a token id past it is an error.
        objective: the run's.

    Attributes:
        reports: what became of the run's raw data sets, by name.
        packing: how the collator lays pairs out; None for a collator of the user's.
        layout: of the collator's rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PreferenceConfig,
        vocab_size: int,
        objective: Objective,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.vocab_size = vocab_size
        self.objective = objective
        self.reports: dict[str, SplitReport] = {}
        self.packing: Packing | None = None
        self.layout = "padded"

    def training_rows(self, dataset: Any) -> Any:
        """The rows of the data set of training, tokenized if it is raw; None for None."""
        return self._rows(dataset, "train_dataset", self.reports)

    def evaluation_rows(self, dataset: Any) -> Any:
        """The rows of the data set of evaluation; of several by name, a dict of them."""
        if not isinstance(dataset, dict):
            return self._rows(dataset, "eval_dataset", self.reports)
        return {
            name: self._rows(part, f"eval_dataset[{name!r}]", self.reports)
            for name, part in dataset.items()
        }

    def later_rows(self, dataset: Any) -> Any:
        """The rows of a data set that is evaluated later."""
        return self._rows(dataset, "eval_dataset", {})

    def _rows(self, dataset: Any, name: str, reports: dict[str, SplitReport]) -> Any:
        if dataset is None or isinstance(dataset, PairRows):
            return dataset
        if is_tokenized(dataset):
            rows = PairRows(dataset)
            rows.check(name, self.vocab_size)
            return rows
        dataset, reports[name] = tokenize_pairs(
            dataset,
            self.tokenizer,
            self.settings,
            training=name == "train_dataset",
            vocab_size=self.vocab_size,
            name=name,
        )
        return PairRows(dataset)

    def choose_collator(
        self, model: Any, rows: PairRows | None, collator: Any = None, stand_in: Any = None
    ) -> Any:
        """The collator of the packing that suits model and rows, and micro-batches that fit.

        Args:
            model: as it will train, patched.
            rows: of training.
            collator: the user's, in place of ours.
            stand_in: a small model of its family, where its own weights will be split.
        """
        if collator is None:
            lengths = None if rows is None else rows.lengths
            self.packing = packing_for(model, self.settings, lengths, stand_in)
            collator = self.packing.collator(pad_token(self.tokenizer, self.vocab_size))
        self.layout = getattr(collator, "layout", "padded")
        if rows is not None:
            fit_micro_batches(self.settings, self.objective, self._planner(rows))
        return collator

    def training_batches(self, rows: PairRows) -> PairBatches:
        """This rank's share of every micro-batch of training."""
        return PairBatches(self._planner(rows), self.settings.process_index)

    def evaluation_batches(self, rows: PairRows) -> PairBatches:
        """This rank's share of an evaluation, in the data set's order."""
        planner = planner_for(self.settings, rows.lengths, self.layout, training=False)
        return PairBatches(planner, self.settings.process_index)

    def summary(self, rows: PairRows) -> PlanSummary:
        """What the plan of the first epoch comes to."""
        return summarise(self._planner(rows))

    def _planner(self, rows: PairRows) -> Planner:
        coupled = self.objective.couples_pairs
        return planner_for(self.settings, rows.lengths, self.layout, coupled=coupled)
