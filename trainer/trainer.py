"""`PreferenceTrainer`: transformers' training loop around the head without logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from .batching.pipeline import PairPipeline
from .checkpoint.resume import settle_date
from .data.template import own_tokenizer
from .errors import refusals
from .loop.arguments import reference_source, settled_arguments
from .loop.batches import BatchedTrainer
from .loop.checkpoints import CheckpointedTrainer
from .loop.nonfinite import NonFiniteGuard
from .loop.outputs import OutputTrainer
from .model.adapters import bare_model, learnable_line, lora_config, with_adapter
from .model.experts import RouterBalance
from .model.loading import (
    adapted_model,
    load_model,
    load_tokenizer,
    prepared_head,
    vocabulary_size,
    with_padding,
)
from .model.merging import check_merges_in_memory
from .model.trial import check_learns, fit_lengths, trial_model, try_model
from .monitor.observer import Observer, RewardMetrics
from .monitor.profiling import ProfileCallback
from .monitor.samples import SampleWriter
from .objectives.lists import Answers
from .objectives.terms import by_edges
from .packing import PAIR_INPUTS, model_inputs
from .packing.split import check_split
from .reference.model import Reference
from .settings.checks import check_evaluation
from .settings.config import PreferenceConfig
from .settings.model import check_adapted
from .settings.unused import say_unused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .objectives import Objective, ObjectiveOutput


class PreferenceTrainer(BatchedTrainer, CheckpointedTrainer, OutputTrainer):
    """A `transformers.Trainer` for preference pairs.

    In order: a step, evaluation, set-up. `BatchedTrainer` deals the pairs, `CheckpointedTrainer`
    saves and resumes, `OutputTrainer` writes the trained model and its card.

    Args:
        model: a causal language model (patched in place, see `patch_head`), or its name or folder.
        args: every setting; its ``objective`` must be named.
        train_dataset, eval_dataset: pairs, raw (``prompt``, ``chosen``, ``rejected``; tokenized
            here by ``args``) or tokenized (``prompt_ids``, ``chosen_ids``, ``rejected_ids``).
            Several of evaluation as a dict: their ``eval_NAME_...`` are not in the report.
        processing_class: the tokenizer, or a processor with one; the model's own if None.
        ref_model: a frozen model; if None, the one that ``args`` name, or the model as it is now.
        peft_config: wrap the model in this adapter, not on lm_head; if None, as ``args`` say.
        data_collator: in place of `PairCollator`, with the same output.
        callbacks, optimizers: as in `transformers.Trainer`.
        objective: in place of the one that ``args`` name.
        compute_metrics: called after an evaluation with transformers' ``EvalPrediction``, of
            rewards and not of logits: ``predictions`` [pairs, 2] are those of chosen and rejected,
            in the data's order, and ``label_ids`` [pairs] are 0, the better one's place.
        quantization_config: of the model, where its name is given; it then needs an adapter.
        model_init: called once, in place of ``model``.
        preprocess_logits_for_metrics: refused, since there are no logits.

    Raises:
        UserError: settings, data or a model that do not fit; the message says what to do.
    """

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward (`compute_loss`) and backward."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        stats, self.scoring.stats = self.scoring.stats, None
        if stats is not None:
            self.observer.add_head(stats)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the mean over the step's pairs (``num_items_in_batch``).

        Without that number, as in evaluation, the mean over the micro-batch's own pairs.
        """
        reference, answers = None, Answers.of(inputs)
        if self.reference is not None:
            reference, answers = self.reference.compared(model, inputs)
        balanced = self.balance.inputs(inputs, model.training)
        scored: Any = model(**model_inputs(inputs), **balanced)
        out = self._pair_losses(scored, reference, inputs, answers, model.training)
        loss = out.loss
        if num_items_in_batch is not None:
            loss = out.losses.sum() * self.args.data_parallel_size / num_items_in_batch
        if balanced:
            self.balance.check(scored.aux_loss)
        if scored.aux_loss is not None:
            self.observer.training.add(aux_loss=scored.aux_loss)
            micro_batches = self.current_gradient_accumulation_steps
            loss = loss + self.balance.share(scored.aux_loss, micro_batches)
        self._observe(inputs, scored, reference, out, loss)
        return (loss, {"pairs": out}) if return_outputs else loss

    def _pair_losses(
        self, scored: Any, reference: Any, inputs: Any, answers: Any, training: bool
    ) -> ObjectiveOutput:
        """The objective of the micro-batch, with the other ranks' pairs where it couples them."""
        self.objective.max_pairs_per_rank = self._max_pairs_per_rank(training)
        return self.objective.train(training)(
            scored.token_logps,
            inputs["cu_seqlens"],
            reference,
            pair_ids=inputs["pair_ids"],
            group=self._coupled_ranks(),
            log_sum_squares=None if scored.figures is None else scored.figures[0],
            answers=answers,
            **{name: inputs[name] for name in PAIR_INPUTS if name in inputs},
        )

    def _observe(
        self,
        inputs: Any,
        scored: Any,
        reference: Tensor | None,
        out: ObjectiveOutput,
        loss: Tensor,
    ) -> None:
        """Note metrics, and what would stop the step; nothing waits for the device."""
        training = self.objective.training
        with_margins = self.is_in_train and not training
        self.observer.add(inputs, scored, out, training=training, with_margins=with_margins)
        if not training:
            return
        if self.reference is not None and reference is not None:
            reference = by_edges(reference, inputs.get("edges"))
            self.reference.check_first(out, reference, self.state.global_step, self.objective.name)
        self.nonfinite_guard.saw(inputs["pair_ids"], out.losses, loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.nonfinite_guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.nonfinite_guard.norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this project's metrics to what is logged after training steps."""
        if "loss" in logs:
            logs.update(self.observer.training_figures())
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the means over pairs of all metrics."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        with self.observer.evaluating():
            output: Any = super().evaluation_loop(*args, **kwargs)
        output.metrics.update(self.reward_metrics.figures(prefix, self.args))
        output.metrics.update(self.observer.evaluation_figures(prefix, self.state.global_step))
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            computed = self.compute_loss(model, inputs, return_outputs=True)
        loss, outputs = computed if isinstance(computed, tuple) else (computed, {})
        self.observer.evaluation.add_loss(loss, self.objective.count(inputs))
        if "pairs" in outputs:  # a subclass may compute a loss without them
            self.reward_metrics.add(inputs["pair_ids"], outputs["pairs"])
        return loss.detach(), None, None

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | str | None = None,
        peft_config: Any = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        objective: Objective | None = None,
        compute_metrics: Any = None,
        quantization_config: Any = None,
        model_init: Any = None,
        preprocess_logits_for_metrics: Any = None,
    ) -> None:
        given = (train_dataset, processing_class, ref_model, objective is not None)
        of_trl = (model_init, quantization_config, preprocess_logits_for_metrics)
        model, args = settled_arguments(model, args, *given, *of_trl)
        self.reward_metrics = RewardMetrics(compute_metrics, args.eval_samples)
        self.objective = args.build_objective() if objective is None else objective
        ref_model, starting = reference_source(model, args, ref_model, self.objective)
        say_unused(args, self.objective)
        lm, tokenizer = self._load(model, args, processing_class, peft_config, quantization_config)
        check_evaluation(args, eval_dataset, measures_more=compute_metrics is not None)
        self.scoring = prepared_head(lm, args)
        self.scoring.figures |= self.objective.hyperparameters.use_weighting
        self.balance = RouterBalance(bare_model(lm), args.router_aux_loss_coef)
        self.pipeline = PairPipeline(tokenizer, args, vocabulary_size(lm), self.objective)
        rows = self.pipeline.training_rows(train_dataset)
        held_out = self.pipeline.evaluation_rows(eval_dataset)
        parts = [rows, *(held_out.values() if isinstance(held_out, dict) else [held_out])]
        fit_lengths(lm, parts, exchanged=self.objective.exchanges_answers)
        peft_config = peft_config or lora_config(args)
        self.reference = None
        if self.objective.needs_reference:
            of_run = (ref_model, tokenizer, peft_config, parts)
            self.reference = Reference(self.objective, lm, args, *of_run, starting=starting)
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights too are the seed's, and on all ranks
            lm = with_adapter(lm, peft_config, warns=args.process_index == 0)
        if rows is not None:
            check_learns(lm, optimizers[0])
        small = trial_model(lm, args)
        data_collator = self.pipeline.choose_collator(lm, rows, data_collator, small)
        with refusals("settings", ValueError, ImportError, OSError):
            super().__init__(
                model=lm,
                args=args,
                train_dataset=rows,
                eval_dataset=held_out,
                processing_class=tokenizer,
                data_collator=data_collator,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self._start(lm, small)

    def _load(
        self, model: Any, args: PreferenceConfig, tokenizer: Any, peft_config: Any, quantized: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, loaded if they are only named."""
        by_name = isinstance(model, str)
        if by_name:
            args.model_name_or_path = model
        self._merges_files = args.model_name_or_path is not None
        adapted = args.use_peft or peft_config is not None or hasattr(model, "get_base_model")
        adapted = adapted or (by_name and adapted_model(args, model) is not None)
        check_adapted(args, adapted, quantized is not None)
        lm: PreTrainedModel = load_model(args, quantization=quantized) if by_name else model
        if args.merge_adapter and not self._merges_files:
            check_merges_in_memory(lm, args)
        if tokenizer is None:
            args.model_name_or_path = args.model_name_or_path or lm.config._name_or_path
            tokenizer = load_tokenizer(args)
        tokenizer = with_padding(own_tokenizer(tokenizer), "processing_class")
        settle_date(args, tokenizer)
        check_split(args, lm.config, args.world_size)
        return lm, tokenizer

    def _start(self, lm: Any, small: Any) -> None:
        """Check the head where it will run, prepare the reference, and watch from here on."""
        self.model_accepts_loss_kwargs = True  # losses are scaled here, over the step's pairs
        args: Any = self.args
        autocast, rows = self.accelerator.autocast(), self.train_dataset
        try_model(lm, small, args, autocast, rows, self.data_collator)
        if self.reference is not None:
            self.reference.prepare(self, self.pipeline.packing)
        self.observer = Observer(lm, args)
        self.nonfinite_guard = NonFiniteGuard(self, self.objective, self.observer.training)
        self.add_callback(self.nonfinite_guard)
        self.add_callback(self.observer)
        if args.eval_samples:
            self.add_callback(SampleWriter(self))
        if args.profile:
            self.add_callback(ProfileCallback())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with refusals("optim", ValueError, TypeError, ImportError):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with refusals("lr_scheduler_type, lr_scheduler_kwargs", ValueError, TypeError):
            return super().create_scheduler(*args, **kwargs)

    def notes(self) -> list[str]:
        """What a reader of the log should know of the model and its reference."""
        model: Any = self.model
        lines = [learnable_line(model)] if hasattr(model, "get_base_model") else []
        lines += self.engine_notes
        return lines + ([] if self.reference is None else self.reference.notes)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.observer.throughput.paused():
            super()._save_checkpoint(model, trial)
