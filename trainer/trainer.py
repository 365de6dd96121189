"""`PreferenceTrainer`: transformers' training loop around the head without logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from .checkpoint.card import write_model_card
from .checkpoint.hub import hub_refusals
from .errors import UserError, refusals
from .loop.planned import PlannedTrainer
from .model.adapters import bare_model, learnable_line, lora_config, with_adapter
from .model.head import check_head, patch_head
from .model.loading import disable_dropout, load_model, load_tokenizer, vocabulary_size
from .model.merging import check_merges_in_memory, export_merged
from .monitor.metrics import PreferenceMetrics
from .monitor.profiling import ProfileCallback
from .monitor.recorder import MarginRecorder
from .monitor.samples import SampleWriter
from .monitor.throughput import Throughput, peak_memory_mib
from .packing import model_inputs
from .reference.model import reference_for
from .settings.adapter import check_adapted
from .settings.config import PreferenceConfig
from .settings.evaluation_data import check_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTIVE_FILE = "objective.safetensors"
logger = logging.getLogger(__name__)


class PreferenceTrainer(PlannedTrainer):
    """A `transformers.Trainer` for preference pairs.

    Args:
        model: a causal language model, or the name or folder of one. It is patched in place, see
            `patch_head`; without targets it behaves as before.
        args: every setting; its ``objective`` must be named.
        train_dataset, eval_dataset: pairs, raw (``prompt``, ``chosen``, ``rejected``; tokenized
            here by ``args``) or tokenized (``prompt_ids``, ``chosen_ids``, ``rejected_ids``).
            Several of evaluation as a dict: metrics are then ``eval_NAME_...``, and the report,
            which charts ``eval_...``, leaves them out.
        processing_class: the tokenizer; the model's own if None.
        ref_model: a frozen model for objectives with a reference; if None, the one that ``args``
            name, or else the model as it is now. It is patched too.
        peft_config: wrap the model in this adapter, not on lm_head; if None, as ``args`` say.
        data_collator: in place of `PairCollator`, with the same output.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        UserError: settings, data or a model that do not fit; the message says what to do.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: PreferenceConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | str | None = None,
        peft_config: Any = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        _check_arguments(model, args, processing_class)
        self.objective = args.build_objective()
        if isinstance(ref_model, str):
            args.ref_model_name_or_path, ref_model = ref_model, None
        # An object may have other weights by now than what its name stands for.
        of_policy = (None, model) if isinstance(model, str) else (None,)
        starting = ref_model is None and args.ref_model_name_or_path in of_policy
        if isinstance(model, str):
            args.model_name_or_path = model
        self._merges_files = args.model_name_or_path is not None
        adapted = args.use_peft or peft_config is not None or hasattr(model, "get_base_model")
        check_adapted(args, adapted)
        lm: PreTrainedModel = load_model(args) if isinstance(model, str) else model
        if args.merge_adapter and not self._merges_files:
            check_merges_in_memory(lm, args)
        if processing_class is None:
            args.model_name_or_path = args.model_name_or_path or lm.config._name_or_path
            processing_class = load_tokenizer(args)
        check_evaluation(args, eval_dataset)
        if args.disable_dropout:
            disable_dropout(lm)
        self.scoring = patch_head(bare_model(lm), **args.head_settings)
        if args.n_gpu > 1:
            logger.warning(
                "Using one of %d GPUs; for all of them start with accelerate launch", args.n_gpu
            )
            args._n_gpu = 1
        self.run_notes: dict[str, Any] | None = None  # of run.json, where there is one
        self.tokenize_with(processing_class, args, vocabulary_size(lm))
        train_dataset = self._pairs(train_dataset, "train_dataset")
        eval_dataset = self._held_out(eval_dataset)
        held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        peft_config = lora_config(args) if peft_config is None else peft_config
        self.reference = reference_for(
            self.objective,
            lm,
            args,
            ref_model,
            processing_class,
            peft_config,
            [train_dataset, *held_out],
            starting=starting,
        )
        if peft_config is not None:
            set_seed(args.seed)  # the adapter's first weights too are the seed's, and on all ranks
            lm = with_adapter(lm, peft_config)
        data_collator = self.plan_batches(lm, args, data_collator, train_dataset)
        with refusals("settings", ValueError, ImportError, OSError):
            super().__init__(
                model=lm,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                data_collator=data_collator,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        # Losses are scaled here, over the step's pairs; the second name is transformers < 5.20's.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            with self.accelerator.autocast():  # flash attention takes no fp32
                check_head(lm)
        if self.reference is not None:
            self.reference.prepare(self, self.packing)
        self._watch(lm)

    def _watch(self, model: Any) -> None:
        """Metrics, and the callbacks that record what is asked for."""
        self._metrics = {"train": PreferenceMetrics(), "eval": PreferenceMetrics()}
        self._margins = MarginRecorder()
        self._throughput = Throughput(model, self.args.device, self.args.world_size)
        self.add_callback(_Clock(self._throughput))
        self.add_callback(self._margins)
        args: Any = self.args
        if args.eval_samples:
            self.add_callback(SampleWriter(self))
        if args.profile:
            self.add_callback(ProfileCallback())

    def notes(self) -> list[str]:
        """What a reader of the log should know of the model and its reference."""
        model: Any = self.model
        lines = [learnable_line(model)] if hasattr(model, "get_base_model") else []
        return lines + ([] if self.reference is None else self.reference.notes)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with refusals("optim", ValueError, TypeError, ImportError):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with refusals("lr_scheduler_type", ValueError, TypeError):
            return super().create_scheduler(*args, **kwargs)

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
        cu_seqlens = inputs["cu_seqlens"]
        reference = None if self.reference is None else self.reference.sums(model, inputs)
        scored = model(**model_inputs(inputs))
        distributed = self.args.world_size > 1 and self.objective.couples_pairs
        self.objective.max_pairs_per_rank = self._max_pairs_per_rank(model.training)
        out = self.objective.train(model.training)(
            scored.token_logps,
            cu_seqlens,
            reference,
            pair_ids=inputs["pair_ids"],
            group=dist.group.WORLD if distributed else None,
        )
        if self.reference is not None and reference is not None and model.training:
            self.reference.check_first(out, reference, self.state.global_step, self.objective.name)
        metrics = self._metrics["train" if model.training else "eval"]
        metrics.add_pairs(out, scored.mean_logits, cu_seqlens)
        if self.is_in_train and not model.training:
            self._margins.add(out)
        if "decoder_tokens" in inputs:  # a collator of the user's own may not count
            metrics.add_tokens(inputs["decoder_tokens"])
        loss = out.loss
        if num_items_in_batch is not None:
            loss = out.losses.sum() * self.args.world_size / num_items_in_batch
        if model.training:
            self.guards.saw(inputs["pair_ids"], out.losses, loss)
        return (loss, {"pairs": out}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        stats, self.scoring.stats = self.scoring.stats, None
        if stats is not None:
            self._metrics["train"].add(
                batches=torch.ones_like(stats.active_fraction),
                **{
                    "head/active_fraction": stats.active_fraction,
                    "head/averaged_mass": stats.averaged_mass_mean,
                },
            )
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the means over pairs of all metrics."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self._metrics["eval"] = PreferenceMetrics()
        self._margins.start()
        with self._throughput.paused():
            output: Any = super().evaluation_loop(*args, **kwargs)
        means, _ = self._metrics["eval"].report(f"{prefix}_")
        output.metrics.update(means)
        if prefix == "eval":  # the report has the margins of one evaluation a step
            main = self.args.process_index == 0
            self._margins.write(self._own_output_dir, self.state.global_step, main=main)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', and with ``merge_adapter`` the merged model beside what it writes."""
        super().save_model(output_dir, _internal_call)
        args: Any = self.args
        if args.merge_adapter and args.should_save and not _internal_call:
            self.save_merged(Path(output_dir or self._own_output_dir))

    def save_merged(self, folder: Path) -> Path:
        """The model with the adapter saved in ``folder`` merged in; where it was written."""
        args: Any = self.args
        base = None if self._merges_files else self.model
        export_merged(args, folder, folder / "merged", base)
        return folder / "merged"

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', from the run's settings, data, results and versions."""
        if self.is_world_process_zero():
            names = ("language", "license", "tags", "model_name", "finetuned_from")
            write_model_card(self, self.run_notes, **dict(zip(names, args, strict=False)), **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with hub_refusals("push_to_hub: the repository cannot be made; or set push_to_hub: false"):
            super().init_hf_repo(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this project's metrics to what is logged after training steps."""
        if "loss" in logs:
            means, counts = self._metrics["train"].report()
            means.pop("loss", None)
            rates = self._throughput.report(counts)
            logs.update(means, **rates, peak_memory_mib=peak_memory_mib(self.args.device))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._throughput.paused():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.objective.state_dict()
        if state and self.args.should_save:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, _state_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = _state_file(checkpoint)
        if path.is_file():
            self.objective.load_state_dict(load_file(path))
        elif self.objective.state_dict():
            raise UserError(
                f"checkpoint {checkpoint}: it has no {OBJECTIVE_FILE}, which "
                f"{self.objective.name} needs to go on; was it saved with another objective?"
            )


class _Clock(TrainerCallback):
    """Starts and stops the clock with training."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.pause()


def _check_arguments(model: object, args: object, tokenizer: object) -> None:
    """Raise ``UserError`` for an argument of another kind, such as TRL's settings."""
    if not isinstance(model, str | torch.nn.Module):
        raise UserError(
            f"model: expected a causal language model or its name, got {type(model).__name__}"
        )
    if not isinstance(args, PreferenceConfig):
        raise UserError(
            f"args: expected a PreferenceConfig, got {type(args).__name__}; for other libraries' "
            "settings see docs/migration.md"
        )
    if isinstance(tokenizer, str):
        raise UserError(
            "processing_class: expected a tokenizer, got its name; leave it out and set "
            f"PreferenceConfig(tokenizer_name_or_path={tokenizer!r})"
        )


def _state_file(folder: str) -> Path:
    return Path(folder) / OBJECTIVE_FILE
