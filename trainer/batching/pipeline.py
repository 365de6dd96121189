"""`PairPipeline`: from a data set to the micro-batches of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..data import tokenize_pairs
from ..data.chat import pad_token
from ..data.pairs import tokenize_parts
from ..data.report import SplitReport
from ..data.table import FILLER_ID, PairRows, check_kind, check_scores, is_tokenized
from ..data.table.mismatched import neighbours
from ..errors import UserError
from ..packing.inputs import check_collator
from ..packing.split import refuse_split, split_packing
from ..packing.verify import packing_for
from .images import refuse_raw_images, run_packing, run_processor
from .planner import Plan, Planner
from .run_plan import PlanSummary, fit_micro_batches, planner_for, summarise
from .streams import StreamedRows, read_stream, rows_of_stream

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ..data.images.processor import ImageProcessor
    from ..objectives import Objective
    from ..packing.choose import Packing
    from ..settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


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
        self.images: ImageProcessor | None = None

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
        rows = self._tokenized(dataset, name, reports)
        if rows is not None:
            check_kind(self.objective.takes, rows.single, name)
            if rows.has_images and self.images is None:
                self.images = run_processor(self.tokenizer, self.settings, self.objective)
        if rows is not None and self.objective.ranks_lists and not rows.has_lists:
            raise UserError(
                f"{name}: name the objective in the settings, so that the scores and all answers "
                f"to a prompt that {self.objective.name} ranks are read"
            )
        return rows

    def _tokenized(self, dataset: Any, name: str, reports: dict[str, SplitReport]) -> Any:
        if isinstance(dataset, PairRows) and self.settings.group_by_prompt and not dataset.trees:
            return PairRows.of(dataset.source, self.settings)
        if dataset is None or isinstance(dataset, PairRows):
            return dataset
        if is_tokenized(dataset):
            refuse_raw_images(name, dataset)
            if name == "train_dataset":
                check_scores(self.settings.margin_from, dataset, dataset.column_names, name)
            rows = PairRows.of(dataset, self.settings)
            rows.check(name, self.vocab_size)
            return rows
        if isinstance(dataset, IterableDataset) and name == "train_dataset":
            rows = rows_of_stream(dataset, self.settings, self._shard, self._rows_of_shard)
            self._say(self.reports[name])
            return rows
        if isinstance(dataset, IterableDataset):
            dataset = read_stream(dataset, self.settings.max_eval_samples)
        dataset, reports[name] = tokenize_pairs(
            dataset,
            self.tokenizer,
            self.settings,
            training=name == "train_dataset",
            vocab_size=self.vocab_size,
            name=name,
        )
        self._say(reports[name])
        return PairRows.of(dataset, self.settings)

    def _shard(self, parts: list[Any], folder: str) -> Any:
        """The pairs of a shard of a stream; the report is of the last shard that was read."""
        pairs, self.reports["train_dataset"] = tokenize_parts(
            parts, self.tokenizer, self.settings, vocab_size=self.vocab_size, folder=folder
        )
        return pairs

    def _rows_of_shard(self, pairs: Any) -> PairRows:
        rows = PairRows.of(pairs, self.settings)
        check_kind(self.objective.takes, rows.single, "train_dataset")
        return rows

    def _say(self, report: SplitReport) -> None:
        if not report.is_plain and self.settings.process_index == 0:
            logger.warning("%s", "\n".join(report.lines()))

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
        if rows is not None and rows.trees is not None and self.objective.token_weights:
            remedy = "ld_alpha: leave it" if rows.single else "group_by_prompt: set it to false"
            raise UserError(
                f"{remedy}; {self.objective.token_weights} weighs tokens of an answer by the other "
                "answer of its pair"
            )
        if collator is None:
            lengths = None if rows is None else rows.lengths
            padded = run_packing(self.images, model, rows, self.settings)
            packing = padded or packing_for(model, self.settings, lengths, stand_in)
            self.packing = split_packing(packing, model, self.settings, stand_in)
            collator = self.packing.collator(pad_token(self.tokenizer, self.vocab_size))
            collator.images = self.images
            collator.scores_prompts = self.objective.scores_prompts
        else:
            refuse_split(self.settings, "data_collator")
            if rows is not None:
                check_collator(collator, rows[0])
        self.layout = getattr(collator, "layout", "padded")
        if rows is not None:
            fit_micro_batches(self.settings, self.objective, self._planner(rows))
        return collator

    def training_batches(self, rows: PairRows) -> PairBatches:
        """This rank's share of every micro-batch of training."""
        batches = self._batches(self._planner(rows), rows)
        if isinstance(rows, StreamedRows):

            def of_shard(shard: int) -> tuple[Planner, np.ndarray | None]:
                rows.go_to(shard)
                return self._planner(rows), self._prompts(rows)

            batches.of_epoch = of_shard
        return batches

    def evaluation_batches(self, rows: PairRows) -> PairBatches:
        """This rank's share of an evaluation, in the data set's order."""
        lengths = rows.lengths
        planner = planner_for(self.settings, lengths, self.layout, self.objective, training=False)
        return self._batches(planner, rows)

    def _batches(self, planner: Planner, rows: PairRows) -> PairBatches:
        return PairBatches(planner, self.settings.data_parallel_rank, self._prompts(rows))

    def _prompts(self, rows: PairRows) -> np.ndarray | None:
        return rows.prompts if self.objective.exchanges_answers else None

    def rewind(self, rows: Any) -> None:
        """Have a stream's first shard again; anything else is as it was."""
        if isinstance(rows, StreamedRows):
            rows.go_to(0)

    def summary(self, rows: PairRows) -> PlanSummary:
        """What the plan of the first epoch comes to."""
        return summarise(self._planner(rows), self.settings.sequence_parallel_size)

    def _planner(self, rows: PairRows) -> Planner:
        return planner_for(self.settings, rows.lengths, self.layout, self.objective)


class PairBatches(BatchRebalanceSampler):
    """Batch sampler over one rank's share of every global micro-batch.

    It derives from transformers' rank-aware batch sampler for the sake of `Trainer`, which leaves
    those unsharded. A rank left without a pair gets the micro-batch's shortest as a filler: index
    ``-1 - i`` stands for pair i with weight zero.

    Args:
        planner: of the whole data set, for all ranks.
        rank: this process's place among the planner's ranks.
        prompts: [rows] a number for every prompt, where each index is to come with its neighbour,
            see `data.table.mismatched`.

    Attributes:
        of_epoch: gives planner and prompts of an epoch, where each has its own data.
    """

    def __init__(self, planner: Planner, rank: int = 0, prompts: np.ndarray | None = None) -> None:
        self.planner, self.rank = planner, rank
        self.prompts = prompts
        self.drop_last = planner.drop_last
        self.epoch = 0
        self.of_epoch: Callable[[int], tuple[Planner, np.ndarray | None]] | None = None
        self._plans: dict[int, Plan] = {}

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.of_epoch is not None:
            self.planner, self.prompts = self.of_epoch(epoch)

    def __len__(self) -> int:
        return self.planner.micro_batches_per_epoch

    def __iter__(self) -> Iterator[list[Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = self.plan
        for micro_batch in range(len(plan)):
            indices = plan.share(micro_batch, self.rank)
            indices = indices or [FILLER_ID - plan.shortest(micro_batch)]
            yield indices if self.prompts is None else self._with_neighbours(micro_batch, indices)

    def _with_neighbours(self, micro_batch: int, indices: list[int]) -> list[tuple[int, int]]:
        assert self.prompts is not None
        shares = (self.plan.share(micro_batch, rank) for rank in range(self.plan.ranks))
        found = neighbours([row for share in shares for row in share], self.prompts)
        return [(i, found[i if i >= 0 else FILLER_ID - i]) for i in indices]

    @property
    def plan(self) -> Plan:
        """The epoch's plan, made once."""
        if self.epoch not in self._plans:
            self._plans = {self.epoch: self.planner.plan(self.epoch)}
        return self._plans[self.epoch]

    @property
    def max_pairs_per_rank(self) -> int:
        """The most pairs (a filler counts) any rank has in a micro-batch of this epoch."""
        return max(1, self.plan.most_pairs)
