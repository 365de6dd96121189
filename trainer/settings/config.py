"""Every setting of a run: model, data, objective and transformers' training arguments."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ...kernels.linear_logprob import TRAINING_TAIL_EPS, Backend, Tail
from ..errors import UserError, expect, expect_number, expect_one_of, is_whole
from ..objectives import (
    OBJECTIVES,
    Objective,
    build_objective,
    canonical_name,
    hyperparameters_of,
)
from ..parallel.groups import Place
from .checks import (
    check_attention,
    check_checkpointing,
    check_environment,
    check_machine,
    check_training,
    unread_file,
    uses_deepspeed,
    with_setting,
)
from .data import DataSettings
from .launch import has_launcher, meeting
from .model import ModelSettings, ReferenceSettings, SampleSettings
from .names import BACKENDS, PACKINGS, TAILS
from .published.unknown import explaining

FIELDS_OF_OBJECTIVES = ("beta", "gamma_beta_ratio")
"""Hyperparameters of objectives that are fields of `PreferenceConfig`."""


def default_workers() -> int:
    return 2 if torch.cuda.is_available() else 0


@explaining
@dataclass
class PreferenceConfig(
    ModelSettings, ReferenceSettings, DataSettings, SampleSettings, TrainingArguments
):
    """Settings of a preference run; all of `transformers.TrainingArguments` included.

    Some defaults differ from transformers': the run logs every 10 steps, evaluates in the batch
    size of training, uses non-reentrant checkpointing, and never replaces non-finite losses.
    """

    #: Name of the objective, a key of ``widemargin.trainer.objectives.OBJECTIVES``; or several with
    #: their weights, as ``{dpo: 0.8, bco: 0.2, sft: 1}`` or ``0.8*dpo + 0.2*bco + sft``.
    objective: dict[str, float] | str | None = None
    #: Scale of the rewards; None for the objective's default.
    beta: float | None = None
    #: Base target margin as a share of beta; None for the objective's default.
    gamma_beta_ratio: float | None = None
    #: Any other hyperparameters of the objective by name. In a YAML file or on the command line
    #: they may stand among the other settings.
    objective_args: dict[str, Any] = field(default_factory=dict)
    #: What the head's backward does with negligible probability mass: "mean", "exact", "drop".
    head_tail: Tail = "mean"
    #: Mass from which the head's backward computes a block of vocabulary, in (0, 1).
    head_tail_eps: float = TRAINING_TAIL_EPS
    #: What runs the head: "triton" (CUDA only), "torch", or "auto", the first that can.
    head_backend: Backend = "auto"
    #: Set every dropout probability to zero, so that a log-prob is one number.
    disable_dropout: bool = True
    #: How pairs are laid out for the decoder: "padded" (two sequences each, padded), "packed" (no
    #: padding), "prefix_shared" (and a pair's prompt once), or "auto", the fastest that is exact.
    packing: str = "auto"
    #: Most tokens a rank computes in a micro-batch of training: padded ones, those of both
    #: sequences, or of prompt, chosen and rejected, as ``packing`` has it. The padding of rows for
    #: dense masks and flex_attention comes on top. Where the configured micro-batches exceed it,
    #: ``gradient_accumulation_steps`` is raised; steps keep their pairs.
    max_tokens_per_micro_batch: int | None = None
    #: Ranks that compute each micro-batch together, for pairs too long for one: each has a part of
    #: its tokens, and in attention a part of the heads. They count as one rank wherever a setting
    #: speaks of pairs.
    sequence_parallel_size: int = 1
    #: Also log ``entropy`` and ``mean_token_accuracy``, by a few more sums in the head.
    token_metrics: bool = False
    #: Write a trace of a few training steps, trace.json.gz, to ``output_dir``.
    profile: bool = False
    #: Write report.html when training ends.
    write_report: bool = True

    #: Pass over up to this many steps whose loss or gradient is not finite, without an update,
    #: before stopping at one.
    max_nonfinite_steps: int = 0
    #: At the first sign of a collapse save a checkpoint and stop, with exit status 3. The run warns
    #: of such signs in any case: chosen answers lose a nat per token, entropy gains one, sampled
    #: answers grow to twice their length or repeat themselves.
    stop_on_collapse: bool = False

    #: A checkpoint's folder to go on from; true for the newest complete one in ``output_dir``;
    #: "auto" for that if there is one.
    resume_from_checkpoint: str | None = None

    output_dir: str = "outputs/run"  # pyright: ignore[reportIncompatibleVariableOverride]
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    per_device_eval_batch_size: int = 0
    #: Processes that collate batches: two beside a GPU; none on a CPU, whose cores they would take.
    dataloader_num_workers: int = field(default_factory=default_workers)
    #: Keep these processes from one epoch to the next.
    dataloader_persistent_workers: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        self._name_checkpointing_as_installed()
        self.report_to = self.report_to or "none"
        given = _values(self)
        self._set_what_this_trainer_needs()
        self.check()
        self.settle_lists()
        self._set_what_this_machine_needs()
        check_machine(self)
        engine = self.accelerator_config or {}
        copies_are_settled = not isinstance(engine, dict) or "non_blocking" in engine
        self._fill_in_as_transformers()
        check_environment(self)
        check_attention(self, self.mixed_precision)
        self._fit_device(copies_are_settled)
        #: What stands in place of defaults that nobody changed: worked out, not asked for.
        self.filled_in = self._replaced_defaults(given)

    def _name_checkpointing_as_installed(self) -> None:
        """Old and new transformers differ in the name; non-reentrant where nothing is said."""
        name = "activation_checkpointing"
        if getattr(self, name, False):
            check_checkpointing(getattr(self, f"{name}_kwargs"), f"{name}_kwargs")
        if not self.gradient_checkpointing:
            return
        if not hasattr(self, name):
            name = "gradient_checkpointing"
        kwargs, other = self.gradient_checkpointing_kwargs, getattr(self, f"{name}_kwargs", None)
        if kwargs and other and kwargs != other:
            raise UserError(
                f"gradient_checkpointing_kwargs: write all of it there, or all in {name}_kwargs; "
                f"the two are {kwargs!r} and {other!r}"
            )
        kwargs = kwargs or other or {}
        check_checkpointing(kwargs)
        if isinstance(kwargs, dict):
            kwargs = {"use_reentrant": False} | kwargs
        self.gradient_checkpointing = self.gradient_checkpointing_kwargs = None
        setattr(self, name, True)
        setattr(self, f"{name}_kwargs", kwargs)

    def _set_what_this_trainer_needs(self) -> None:
        if self.objective is not None:
            self.objective = canonical_name(self.objective)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # a step uses every parameter
        self.remove_unused_columns = False  # the data set has only those that are used
        if self.use_liger_kernel:  # its head, put on after ours, would take its place
            liger = self.liger_kernel_config or {}
            self.liger_kernel_config = liger | {"fused_linear_cross_entropy": False}
        if not self.per_device_eval_batch_size:
            self.per_device_eval_batch_size = self.per_device_train_batch_size

    def _set_what_this_machine_needs(self) -> None:
        if not has_launcher():
            self.ddp_backend = None  # one process has nobody to talk to
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0
        if torch.backends.mps.is_available() and not torch.cuda.is_available():
            self.use_cpu = True  # statistics are kept in float64, which Apple's GPUs do not have

    def _fill_in_as_transformers(self) -> None:
        """transformers' ``__post_init__``; its refusals name the setting."""
        try:
            with meeting(self):
                super().__post_init__()
        except UserError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(with_setting(" ".join(str(error).split()), self)) from error
        except OSError as error:
            raise UserError(unread_file(error, self)) from error

    def _fit_device(self, copies_are_settled: bool) -> None:
        """Head backend and copies to the device, which is known now."""
        if self.head_backend == "triton" and self.device.type != "cuda":
            raise UserError("head_backend: triton needs a CUDA device; leave it at auto")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
            if self.mixed_precision == "fp16" and not uses_deepspeed(self):
                self.mixed_precision = "no"  # which is what accelerate makes of it on a CPU
        accelerator: Any = self.accelerator_config
        if self.dataloader_pin_memory and not copies_are_settled:  # or each waits for the device
            accelerator.non_blocking = True

    def _replaced_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        defaults = defaults_of(type(self))
        return {
            name: value
            for name, value in _values(self).items()
            if given[name] == defaults[name] != value
        }

    def check(self) -> None:
        """Raise ``UserError`` for the first of this project's settings that is out of range."""
        super().check()
        self.check_model()
        self.check_samples()
        expect_one_of("head_tail", self.head_tail, TAILS)
        expect_one_of("head_backend", self.head_backend, BACKENDS)
        expect_one_of("packing", self.packing, PACKINGS)
        eps = self.head_tail_eps
        expect_number("head_tail_eps", eps, "a probability in (0, 1)", above=0, below=1)
        arguments = self.objective_args
        expect("objective_args", arguments, isinstance(arguments, dict), "a mapping")
        self.check_reference()
        limit = self.max_tokens_per_micro_batch
        fits = limit is None or is_whole(limit, 1)
        expect("max_tokens_per_micro_batch", limit, fits, "a number of tokens, or none")
        check_training(self)

    def build_objective(self) -> Objective:
        """The objective these settings name, with its hyperparameters."""
        if self.objective is None:
            raise UserError(
                f"objective: none is named; set objective: to one of {', '.join(OBJECTIVES)}"
            )
        given, known = self.hyperparameters(), hyperparameters_of(str(self.objective))
        for name in FIELDS_OF_OBJECTIVES:
            if name in given and name not in known:
                orpo = self.objective == "orpo" and name == "beta"
                remedy = "write alpha for TRL's beta of ORPOConfig" if orpo else "leave it out"
                raise UserError(f"{name}: {remedy}; {self.objective} has no {name}")
        return build_objective(self.objective, **given)

    def hyperparameters(self) -> dict[str, Any]:
        """Those of the objective that are given: by a field here, or in ``objective_args``."""
        fields_here = {name: getattr(self, name) for name in FIELDS_OF_OBJECTIVES}
        given = {name: value for name, value in fields_here.items() if value is not None}
        for name in given.keys() & self.objective_args.keys():
            raise UserError(f"{name}: given beside objective_args and in it; keep one")
        return given | self.objective_args

    def __getstate__(self) -> dict[str, Any]:
        """Without the hub's token: transformers pickles settings into folders that are shared."""
        return {**self.__dict__, "hub_token": None}

    @property
    def head_settings(self) -> dict[str, Any]:
        """How a patched head scores: the keyword arguments of `patch_head`."""
        return {
            "tail": self.head_tail,
            "tail_eps": self.head_tail_eps,
            "backend": self.head_backend,
            "place": Place.of(self),
        }

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, over all ranks and accumulation steps."""
        per_rank = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.__dict__.get("_kept_pairs_per_step", per_rank * self.data_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of ranks that share rows, with pairs of their own."""
        return max(1, self.world_size // self.sequence_parallel_size)

    @property
    def data_parallel_rank(self) -> int:
        """This rank's, or its group's, place among them."""
        return self.process_index // self.sequence_parallel_size

    def keep_pairs_per_step(self) -> None:
        """Let ``pairs_per_step`` stay as it is when the accumulation steps change."""
        self._kept_pairs_per_step = self.pairs_per_step


def _values(config: PreferenceConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name, None) for each in fields(config)}


def defaults_of(kind: type[PreferenceConfig]) -> dict[str, Any]:
    """Every setting's default, before a run fills in or adjusts any."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(kind)
    }


def objective_keys(objective: str) -> set[str]:
    """Hyperparameters that belong in ``objective_args``: those that are no fields here."""
    return set(hyperparameters_of(objective)) - set(FIELDS_OF_OBJECTIVES)
