"""The frozen model that objectives with a reference compare the policy with.

Its summed log-probs of a batch come from the cheapest place that has them:

1. the rows, in columns ``reference_chosen_logps`` and ``reference_rejected_logps``: the user's, or
   computed once before training (``precompute_ref_log_probs``, see `cache`);
2. another model, if one is given or named;
3. the policy's own base under its disabled adapter;
4. a frozen copy of the policy as it is before training, whatever checkpoint is loaded later.

All are scored by the head without logits, in the batch's own layout and precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.table.columns import columns_digest
from ..errors import UserError
from ..model.adapters import bare_model, starts_as_its_base
from ..model.digest import model_digest
from ..model.loading import load_model
from ..objectives.lists import Answers
from ..packing import FROZEN, MISMATCHED, inputs_after, model_inputs
from ..settings.checks import is_split
from .cache import precomputed
from .source import (
    SyncedReference,
    check_columns,
    check_mismatched,
    check_packing,
    check_synced,
    check_tokenizer,
    checked,
    copy_of,
    loaded_again,
    placed,
    prepare_frozen,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from ..data.table import PairRows
    from ..objectives import Objective, ObjectiveOutput
    from ..packing.choose import Packing
    from ..settings.config import PreferenceConfig

LN_2 = 0.6931
TOLERANCE = {"fp32": 0.01, "half": 0.2}
"""How far rounding moves a sequence's log-prob, per square root of its tokens, at the most."""

logger = logging.getLogger(__name__)


class Reference:
    """Where the reference's log-probs come from.

    Args:
        objective: what compares with it.
        policy: the bare or adapted model before training; not yet in ``peft_config``'s adapter.
        args: the run's settings.
        ref_model: a model to use, or None for what the settings say.
        tokenizer: the policy's.
        peft_config: of the adapter the policy is about to get, or None.
        rows: the data sets of training and evaluation.
        starting: whether the reference is the policy as it is now.

    Raises:
        UserError: a reference of another vocabulary, or that is the policy itself.
    """

    def __init__(
        self,
        objective: Objective,
        policy: Any,
        args: PreferenceConfig,
        ref_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: Any,
        rows: list[PairRows | None],
        *,
        starting: bool,
    ) -> None:
        self.args = args
        self.objective = objective
        self.starting = starting
        self.model: PreTrainedModel | None = None
        self.notes: list[str] = []
        self._lacking = [part for part in rows if part is not None and not part.has_reference]
        self._under_adapter = peft_config is not None and starts_as_its_base(peft_config)
        self._starts_under_adapter = self._under_adapter
        self._digest: str | None = None
        self._unchecked = True
        self._autocast: Any = nullcontext
        self._unwrap: Any = bare_model
        self._other = False
        if len(self._lacking) < sum(part is not None for part in rows):
            check_columns(objective)
        check_mismatched(objective, args, rows)
        if not self._lacking and any(part is not None for part in rows):
            return
        self._other = ref_model is not None or not self.starting
        if self._other:
            if ref_model is None:
                check_tokenizer(args, tokenizer)
                ref_model = load_model(args, args.ref_model_name_or_path)
            self.model = checked(ref_model, policy)
        elif not self._policy_can_score():
            self.model = copy_of(policy, args)
        if self.model is not None:
            prepare_frozen(self.model, args, rows, exchanged=objective.exchanges_answers)
        named: Any = bare_model(self.model or policy)
        self._name = args.ref_model_name_or_path if self._other else args.model_name_or_path
        self._name = self._name or named.config._name_or_path
        if args.precompute_ref_log_probs or self.model is not None:
            self._digest = model_digest(self.model or policy, args.process_index == 0)

    def _policy_can_score(self) -> bool:
        """Whether the policy itself serves, with no copy: as it is now, or under its adapter.

        Now, that is in `prepare`, a policy that will be split is not yet fit to run.
        """
        if self.args.precompute_ref_log_probs:
            return not is_split(self.args)
        return self._under_adapter

    def prepare(self, trainer: Trainer, packing: Packing | None) -> None:
        """Put the frozen model where it runs, and compute the log-probs now where asked to.

        Call it on all ranks, with the trainer's model not yet trained or loaded from a checkpoint.
        ``packing`` is what was settled on for the policy.
        """
        accelerator = trainer.accelerator
        if not is_split(self.args):
            self._autocast = accelerator.autocast
        self._unwrap = accelerator.unwrap_model
        if self.model is not None:
            self.model = placed(self.model, accelerator, self.args)
        if self.args.sync_ref_model:
            check_synced(self.model, self.args)
            trainer.synced = SyncedReference(self.model)  # pyright: ignore
            trainer.add_callback(trainer.synced)  # pyright: ignore
        if self._other and packing is not None and not is_split(self.args):
            with self._autocast():
                check_packing(self.model, packing)
        if self._digest is None or not self.args.precompute_ref_log_probs:
            return
        frozen: Any = self.model or trainer.model
        with self._scoring(frozen, disable_adapter=self.model is None and self._under_adapter):
            for rows in self._lacking:
                self.notes.append(self._precompute(rows, lambda: frozen, trainer))
        self.model = None
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _precompute(self, rows: PairRows, frozen: Callable[[], Any], trainer: Trainer) -> str:
        """Give ``rows`` their log-probs, and return the line that says from where."""
        values, note = precomputed(
            rows,
            self._digest or "",
            lambda batch: _summed_logps(self.objective, frozen(), trainer._prepare_inputs(batch)),
            trainer,
            weights=self.objective.token_weights,
        )
        rows.set_reference(values)
        logger.info(note)
        return note

    def precompute_later(self, rows: PairRows, trainer: Trainer) -> None:
        """Give rows that are evaluated later their log-probs, if no frozen model is here for them.

        Call it on all ranks. What is not on disk a model computes that is loaded for it and let go.
        """
        here = rows.has_reference or self.model is not None or self._under_adapter
        if here or self._digest is None or is_split(self.args):
            return
        again = cache(
            lambda: loaded_again(
                self._name, self._digest or "", self.args, trainer.accelerator, rows
            )
        )
        with torch.no_grad(), self._autocast():
            self._precompute(rows, again, trainer)

    def content(self, rows: PairRows) -> str:
        """The hash of what ``rows`` are compared with, on the main process; "" for the base."""
        if rows not in self._lacking and rows.has_reference:
            return columns_digest(rows)
        return "" if self._starts_under_adapter and not self._other else self._digest or ""

    def sums(self, policy: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Summed log-probs [S] of the batch's completions, fp32 (fp64 for an fp64 model)."""
        given = batch.get("reference_logps")
        if given is not None:
            return given
        model = policy if self.model is None else self.model
        if self.model is None and not self._under_adapter:
            raise UserError(
                "reference: this data set has no reference log-probs, and the frozen model is no "
                "longer here; give it as eval_dataset, or set precompute_ref_log_probs: false"
            )
        with self._scoring(model, disable_adapter=self.model is None):
            return _summed_logps(self.objective, model, batch)

    def compared(
        self, policy: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Answers | None]:
        """The `sums` of a batch, and what it says of its answers.

        Mismatched answers stand behind their prompts beside the batch's own ones, in one forward of
        the frozen model, and alone in one without gradients of the policy.
        """
        answers, frozen = Answers.of(batch), inputs_after(FROZEN, batch)
        if answers is None or not frozen:
            return self.sums(policy, batch), answers
        mismatched = inputs_after(MISMATCHED, batch)
        with self._scoring(policy, disable_adapter=False):
            gained = _summed_logps(self.objective, policy, mismatched)[mismatched["pairs"]]
        sums = self.sums(policy, frozen)
        answers = replace(answers, mismatched=gained - sums[frozen["pairs"]])
        return batch.get("reference_logps", sums[frozen["sequences"]]), answers

    @contextmanager
    def _scoring(self, model: nn.Module, *, disable_adapter: bool) -> Iterator[None]:
        """Without gradients, dropout or adapter, in the precision that the policy trains in."""
        training = model.training
        if training:
            model.eval()
        adapter = self._unwrap(model).disable_adapter() if disable_adapter else nullcontext()
        try:
            with torch.no_grad(), self._autocast(), adapter:
                yield
        finally:
            if training:
                model.train()

    def check_first(self, out: ObjectiveOutput, reference: Tensor, step: int, name: str) -> None:
        """Warn where policy and reference should still be one model and do not score as one.

        At the first micro-batch of a run from the beginning, and only there: it waits for the
        device once.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        if step or not self.starting:
            return
        sums = torch.cat([out.chosen_sum_logps, out.rejected_sum_logps])
        lengths = torch.cat([out.chosen_lengths, out.rejected_lengths]).clamp(min=1)
        real = out.real.repeat(2)
        apart = torch.where(real, (sums - reference).abs(), 0.0)
        count = real.sum().clamp(min=1)
        noise, mean = torch.stack([(apart / lengths.sqrt()).sum(), apart.sum()]) / count
        if noise <= TOLERANCE["half" if self._rounds() else "fp32"]:
            return
        loss = f" ({name}'s first loss is {out.loss:.4f}, not ln 2 = {LN_2})" * (name == "dpo")
        logger.warning(
            "Before the first step the policy is its own reference, yet their log-probs differ by "
            "%.3g per completion%s. Is dropout on (disable_dropout)? Do the columns "
            "reference_*_logps come from another model, chat template or truncation? Does the "
            "adapter change the model before it has learnt anything?",
            mean.item(),
            loss,
        )

    def _rounds(self) -> bool:
        """Whether anything is computed in fewer digits than fp32 has."""
        args = self.args
        half = args.bf16 or args.fp16 or args.load_in_4bit or args.load_in_8bit or args.tf32
        return bool(half) or args.dtype not in ("float32", "auto")


def _summed_logps(objective: Objective, model: Any, batch: Mapping[str, Any]) -> Tensor:
    scored = model(**model_inputs(batch))
    return objective.sequence_sums(scored.token_logps, batch["cu_seqlens"])
