"""One run from settings to a trained model, or what it would do (`preflight`)."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from .batching.run_plan import fit_micro_batches, planner_for, summarise
from .checkpoint.files import choose_checkpoint, could_not_write
from .checkpoint.hub import push
from .checkpoint.resume import output_claimed, settle_date, start_of_run
from .data import PairData, load_pairs
from .data.chat import Rendering
from .data.first_pair import first_tokens_line, preflight_lines
from .data.table import PairRows
from .data.template import with_template
from .errors import UserError
from .loop.watchdog import missing_ranks
from .model.folder import check_base_stays
from .model.loading import (
    adapted_model,
    load_model,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)
from .monitor.console import ConsoleLines, ConsoleProgress
from .monitor.run_record import RunRecord, changed_settings
from .objectives import Objective
from .packing.choose import choose_packing
from .packing.split import check_split, over_ranks
from .parallel.groups import Place
from .report.write import summary_lines, write_report
from .settings.checks import check_evaluation, check_output, uses_deepspeed
from .settings.config import PreferenceConfig
from .settings.launch import has_launcher
from .settings.model import check_adapted
from .settings.published.scripts import is_mistral, published_steps
from .settings.unused import unused_notes
from .text import colours
from .trainer import PreferenceTrainer


def train(config: PreferenceConfig, script: str | None = None) -> None:
    """Load, train (resuming if told to), evaluate, save, and write ``run.json`` and the report.

    ``script`` names the published script whose twin this is: it counts steps as the script did,
    and evaluates at the end if ``do_eval`` says so.
    """
    objective = config.build_objective()
    if config.sequence_parallel_size > 1:  # before anything is loaded
        check_split(config, load_model_config(config), config.world_size)
    check_output(config)
    check_adapter(config)
    with missing_ranks(config), output_claimed(config):
        _train(config, objective, script)


def _train(config: PreferenceConfig, objective: Objective, script: str | None) -> None:
    start = start_of_run(config, config.resume_from_checkpoint)
    tokenizer = load_tokenizer(config)
    settle_date(config, tokenizer, fresh=start.folder is None)
    model = load_model(config)
    data = load_pairs(config, tokenizer, vocabulary_size(model))
    data.report.notes += weight_notes(config, str(model.dtype).removeprefix("torch."))
    main = config.process_index == 0
    if main:
        print("\n".join([*_resume_lines(start.folder), *data.report.lines()]), flush=True)
    check_training_data(data)
    rows = PairRows.of(data.train, config)
    if script is not None:
        lines = count_steps_as_published(config, len(rows))
        if main and lines:
            print("\n".join(lines), flush=True)
    record = RunRecord(config, objective, data.report.as_dict())
    record.content["run"] = start.run
    if objective.needs_reference and config.ref_model_name_or_path == config.model_name_or_path:
        config.ref_model_name_or_path = None  # the model as just loaded, not a second one
    trainer = PreferenceTrainer(
        model,
        config,
        train_dataset=rows,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        objective=objective,
    )
    if script is not None:
        trainer.saves_use_cache(True)
    _use_console(trainer)
    plan = trainer.pipeline.summary(rows)
    record.content["plan"] = plan.as_dict()
    trainer.run_record = record.content
    if main:
        print(
            "\n".join([str(trainer.pipeline.packing), *plan.lines(), *trainer.notes()]), flush=True
        )
        if start.folder is None:  # in place of the log of an earlier run in this folder
            trainer.save_state()
        record.write()
    result = trainer.train(resume_from_checkpoint=start)
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
    trainer.save_metrics("train", result.metrics | {"train_samples": len(rows)})
    if script is not None and config.do_eval and data.evaluation is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics | {"eval_samples": len(data.evaluation)})
    if main:
        _write_results(config, record, result, trainer)
    if config.push_to_hub:
        push(trainer)


def _resume_lines(checkpoint: Path | None) -> list[str]:
    if checkpoint is None:
        return []
    return [f"Goes on from {checkpoint}; resume_from_checkpoint: false starts from the beginning"]


def count_steps_as_published(config: PreferenceConfig, pairs: int) -> list[str]:
    """Set ``max_steps`` to what a published script came to, where nothing is said of it.

    Returns the line that says so, if it changes anything.
    """
    if config.max_steps > 0:
        return []
    accumulation = config.gradient_accumulation_steps
    per_step, epochs = config.pairs_per_step, config.num_train_epochs
    config.max_steps = published_steps(pairs, per_step, accumulation, epochs)
    ours = math.ceil(epochs * math.ceil(pairs / per_step))
    if config.max_steps == ours:
        return []
    return [
        f"max_steps: {config.max_steps}, as the published script counted them, which left out what "
        f"fills no step; max_steps: {ours} trains on all pairs"
    ]


def _write_results(
    config: PreferenceConfig, record: RunRecord, result: Any, trainer: PreferenceTrainer
) -> None:
    """Write the run's records, and print a summary."""
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


def _use_console(trainer: PreferenceTrainer) -> None:
    trainer.remove_callback(PrinterCallback)
    bar = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ConsoleProgress() if bar else ConsoleLines())


def preflight(config: PreferenceConfig, script: str | None = None) -> None:
    """Print the settings in effect, what becomes of the data and the first pair; train nothing."""
    if config.process_index > 0:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _preflight(config, script)
    else:
        _preflight(config, script)


def _preflight(config: PreferenceConfig, script: str | None) -> None:
    objective = config.build_objective()
    unused = unused_notes(config, objective)
    check_output(config)
    check_adapter(config)
    checkpoint = choose_checkpoint(  # by the sizes of its files; training hashes them
        config.resume_from_checkpoint, config.output_dir, hashes=False
    )
    tokenizer = load_tokenizer(config)
    settle_date(config, tokenizer, fresh=checkpoint is None)
    model_config = load_model_config(config).get_text_config()
    data = load_pairs(config, tokenizer, model_config.vocab_size)
    saved_dtype = str(model_config.dtype).removeprefix("torch.")
    dtype = saved_dtype if config.dtype == "auto" else config.dtype
    data.report.notes += weight_notes(config, dtype)
    data.report.notes += unused
    print("Settings that differ from their defaults")
    for name, value in changed_settings(config).items():
        print(f"  {name}: {value}")
    print(f"\nObjective {objective.name}: {objective.spec.formula}")
    for name, value in dataclasses.asdict(objective.hyperparameters).items():
        print(f"  {name}: {value}")
    if data.train is not None:
        counted = [] if script is None else count_steps_as_published(config, len(data.train))
        lines = [*counted, *_plan_lines(config, objective, data.train, model_config)]
        print("\n" + "\n".join(lines))
    if checkpoint is not None:
        print(f"Would go on from {checkpoint}")
    print("\nData")
    print("\n".join(data.report.lines()))
    if data.train is not None:
        print("\nFirst pair")
        print("\n".join(preflight_lines(data.train[0], tokenizer, colours=colours())))
        begins = first_tokens_line(tokenizer, _published_tokenizer(config), Rendering.of(config))
        if begins is not None:
            print(begins)
    check_training_data(data)
    check_evaluation(config, data.evaluation)


def _published_tokenizer(config: PreferenceConfig) -> Any:
    """The tokenizer with the chat template that the published scripts would have taken."""
    settings = copy.copy(config)
    settings.tokenizer_as_saved = True
    if settings.chat_template is None and is_mistral(settings.model_name_or_path):
        settings.chat_template = "mistral"
    return with_template(load_tokenizer(settings), settings)


def _plan_lines(
    config: PreferenceConfig, objective: Objective, pairs: Dataset, model_config: Any
) -> list[str]:
    """The packing that these settings should get, and the plan of the first epoch."""
    check_split(config, model_config, config.world_size if has_launcher() else None)
    lengths = PairRows.of(pairs, config).lengths
    packing = choose_packing(
        config.packing,
        model_config,
        attention=config.attn_implementation,
        device=config.device,
        dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
        lengths=lengths,
        pairs_per_batch=config.per_device_train_batch_size,
    )
    packing = over_ranks(packing, Place.of(config))
    planner = planner_for(config, lengths, packing.layout, objective)
    fitted = fit_micro_batches(config, objective, planner)
    return [str(packing), *summarise(fitted, config.sequence_parallel_size).lines()]


def check_adapter(config: PreferenceConfig) -> None:
    """Raise ``UserError`` where settings of adapters do not fit the model that is named."""
    name = config.model_name_or_path
    base = None if name is None else adapted_model(config, name)
    goes_on = base is not None
    if goes_on and config.use_peft:
        raise UserError(
            f"use_peft: leave it out, since {name} has an adapter already, which goes on learning; "
            "for a new adapter on top, make a model of that one with widemargin merge"
        )
    check_adapted(config, config.use_peft or goes_on)
    if config.use_peft or goes_on:
        model = name if base is None else base.model_name_or_path
        check_base_stays(model, Path(config.output_dir), "output_dir")


def check_training_data(data: PairData) -> None:
    """Raise ``UserError`` where no split is for training."""
    if data.train is None:
        raise UserError("dataset_splits: none of them is for training; name a train split")


def weight_notes(config: PreferenceConfig, dtype: str) -> list[str]:
    """A remark where the optimizer's small steps would vanish in the weights' rounding.

    DeepSpeed keeps weights in fp32 beside those that compute, whatever their dtype, and peft keeps
    an adapter's.
    """
    notes = []
    precision = config.mixed_precision
    if precision != "no" and not (config.bf16 or config.fp16):
        notes.append(f"computes in {precision}, as the launcher's mixed_precision says")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no" and not config.torch_compile:
        notes.append(f"compiles with {compiler}, as the launcher's dynamo_backend says")
    if config.use_peft or uses_deepspeed(config) or dtype not in ("bfloat16", "float16"):
        return notes
    return [
        *notes,
        f"the weights are updated in {dtype}, where steps of the usual learning rates (1e-6) are "
        "mostly rounded away; set dtype: float32, and bf16: true to compute in bfloat16",
    ]
