"""One run from settings to a trained model: what `widemargin train` does."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import AcceleratorConfig

from .checkpoints import choose_checkpoint, could_not_write
from .checks import check_evaluation, check_output
from .config import PreferenceConfig, defaults_of
from .config_file import is_secret
from .console import ConsoleLines, ConsoleProgress
from .data import PairData, load_pairs, preflight_lines
from .errors import UserError
from .model import load_model, load_model_config, load_tokenizer, vocabulary_size
from .model_card import push
from .objectives import Objective
from .packing_choice import choose_packing
from .plan_limits import fitted, training_planner
from .plan_summary import summarise
from .report import summary_lines, write_report
from .sampler import PairRows
from .trainer import PreferenceTrainer

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGES = ("widemargin", "torch", "triton", "transformers", "accelerate", "datasets", "peft")


def preflight(config: PreferenceConfig) -> None:
    """Print the settings in effect, what becomes of the data and the first pair; train nothing."""
    objective = config.build_objective()
    check_output(config)
    checkpoint = find_checkpoint(config, quiet=False)
    tokenizer = load_tokenizer(config)
    model_config = load_model_config(config).get_text_config()
    data = load_pairs(config, tokenizer, model_config.vocab_size)
    saved_dtype = str(model_config.dtype).removeprefix("torch.")
    if not config.use_peft:  # whose own weights are kept in float32
        data.report.notes += weight_notes(saved_dtype if config.dtype == "auto" else config.dtype)
    print("Settings that differ from their defaults")
    for name, value in changed_settings(config).items():
        print(f"  {name}: {value}")
    print(f"\nObjective {objective.name}: {objective.spec.formula}")
    for name, value in dataclasses.asdict(objective.hyperparameters).items():
        print(f"  {name}: {value}")
    if data.train is not None:
        print("\n" + "\n".join(_plan_lines(config, objective, data.train, model_config)))
    if checkpoint is not None:
        print(f"Would go on from {checkpoint}")
    print("\nData")
    print("\n".join(data.report.lines()))
    if data.train is not None:
        print("\nFirst pair")
        print("\n".join(preflight_lines(data.train[0], tokenizer)))
    check_data(config, data)


def train(config: PreferenceConfig) -> None:
    """Load, train (resuming if told to), evaluate, save, and write ``run.json`` and the report."""
    objective = config.build_objective()
    check_output(config)
    find_checkpoint(config)
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    data = load_pairs(config, tokenizer, vocabulary_size(model))
    by_deepspeed = config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if not (config.use_peft or by_deepspeed):
        data.report.notes += weight_notes(str(model.dtype).removeprefix("torch."))
    main = config.process_index == 0
    if main:
        print("\n".join(data.report.lines()), flush=True)
    check_data(config, data)
    record = RunRecord(config, objective, data)
    if objective.needs_reference and config.ref_model_name_or_path == config.model_name_or_path:
        config.ref_model_name_or_path = None  # the model as just loaded, not a second one
    trainer = PreferenceTrainer(
        model,
        config,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
    )
    _use_console(trainer)
    plan = trainer.plan_summary()
    record.content["plan"] = plan.as_dict()
    trainer.run_notes = record.content
    if main:
        print("\n".join([str(trainer.packing), *plan.lines(), *trainer.notes()]), flush=True)
        record.write()
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    try:
        trainer.save_model(_internal_call=True)  # without a push, which comes last
        trainer.save_state()
    except Exception as error:
        if not could_not_write(error):
            raise
        raise UserError(
            f"output_dir: the trained model cannot be written to {config.output_dir}: {error}. "
            "Make room and go on with resume_from_checkpoint: auto"
        ) from error
    if main:
        _write_results(config, record, result, trainer)
    if config.push_to_hub:
        push(trainer)


def _write_results(
    config: PreferenceConfig, record: RunRecord, result: Any, trainer: PreferenceTrainer
) -> None:
    """What the run's folder holds beside the model, and what the terminal says of it."""
    record.write(
        train_seconds=result.metrics["train_runtime"],
        train_loss=result.training_loss,
        steps=result.global_step,
    )
    print("\n" + "\n".join(summary_lines(Path(config.output_dir))))
    print(f"\nModel: {config.output_dir}")
    if config.merge_adapter:
        print(f"Merged model: {trainer.save_merged(Path(config.output_dir))}")
    trainer.create_model_card()
    if config.write_report:
        print(f"Report: {write_report(Path(config.output_dir))}")


def _plan_lines(
    config: PreferenceConfig, objective: Objective, pairs: Dataset, model_config: Any
) -> list[str]:
    """The packing that these settings should get, and the plan of the first epoch."""
    lengths = PairRows(pairs).lengths
    packing = choose_packing(
        config.packing,
        model_config,
        attention=config.attn_implementation,
        device=config.device,
        dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
        lengths=lengths,
        pairs_per_batch=config.per_device_train_batch_size,
    )
    planner = training_planner(config, objective, lengths, packing.layout)
    return [str(packing), *summarise(fitted(config, objective, planner)).lines()]


def check_data(config: PreferenceConfig, data: PairData) -> None:
    """Raise ``UserError`` where the splits lack what the settings want."""
    if data.train is None:
        raise UserError("dataset_splits: none of them is for training; name a train split")
    check_evaluation(config, data.evaluation)


def weight_notes(dtype: str) -> list[str]:
    """A remark where the optimizer's small steps would vanish in the weights' rounding.

    DeepSpeed keeps weights in fp32 beside those that compute, whatever their dtype, and peft keeps
    an adapter's.
    """
    if dtype not in ("bfloat16", "float16"):
        return []
    return [
        f"the weights are updated in {dtype}, where steps of the usual learning rates (1e-6) are "
        "mostly rounded away; set dtype: float32, and bf16: true to compute in bfloat16"
    ]


def find_checkpoint(config: PreferenceConfig, *, quiet: bool = True) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, by the sizes of its files.

    Training reads and hashes them all, and so may pass over one more.
    """
    return choose_checkpoint(
        config.resume_from_checkpoint, config.output_dir, hashes=False, quiet=quiet
    )


class RunRecord:
    """``run.json``: what the report and a reader need to know of a run."""

    def __init__(self, config: PreferenceConfig, objective: Objective, data: PairData) -> None:
        self.path = Path(config.output_dir) / "run.json"
        self.content: dict[str, Any] = {
            "settings": changed_settings(config),
            "objective": {
                "name": objective.name,
                **dataclasses.asdict(objective.hyperparameters),
            },
            "data": data.report.as_dict(),
            "versions": versions(),
            "device": str(config.device),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "summary": {},
        }

    def write(self, **summary: float) -> None:
        self.content["summary"].update(summary)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.path)


def changed_settings(config: PreferenceConfig) -> dict[str, Any]:
    """Settings somebody gave or a run adjusted, as plain values; secrets are left out."""
    changed = {}
    for name, default in defaults_of(type(config)).items():
        value: Any = getattr(config, name, default)
        if name in config.filled_in:  # unless it was changed afterwards, as by the planner
            default = config.filled_in[name]
        elif isinstance(value, AcceleratorConfig):  # which is filled up
            default = type(value)()
        value = _plain(value)
        if value != _plain(default) and not is_secret(name):
            changed[name] = value
    return changed


def _plain(value: Any) -> Any:
    """The value as JSON and YAML have it."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, AcceleratorConfig):
        return _plain(value.to_dict())
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part) for part in value]
    return value if isinstance(value, int | float | str | None) else str(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _use_console(trainer: PreferenceTrainer) -> None:
    trainer.remove_callback(PrinterCallback)
    bar = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ConsoleProgress() if bar else ConsoleLines())
