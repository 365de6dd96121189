"""One run from settings to a trained model: what `widemargin train` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from .checkpoint.date import settle_date
from .checkpoint.files import could_not_write
from .checkpoint.hub import push
from .checkpoint.resume import output_claimed, start_of_run
from .data import load_pairs
from .data.table import PairRows
from .errors import UserError
from .model.loading import load_model, load_tokenizer, vocabulary_size
from .monitor.console import ConsoleLines, ConsoleProgress
from .monitor.run_record import RunRecord
from .objectives import Objective
from .preflight import check_training_data, weight_notes
from .report.write import summary_lines, write_report
from .settings.checks import check_output
from .settings.config import PreferenceConfig
from .trainer import PreferenceTrainer


def train(config: PreferenceConfig) -> None:
    """Load, train (resuming if told to), evaluate, save, and write ``run.json`` and the report."""
    objective = config.build_objective()
    check_output(config)
    with output_claimed(config):
        _train(config, objective)


def _train(config: PreferenceConfig, objective: Objective) -> None:
    start = start_of_run(config, config.resume_from_checkpoint)
    tokenizer = load_tokenizer(config)
    settle_date(config, tokenizer)
    model = load_model(config)
    data = load_pairs(config, tokenizer, vocabulary_size(model))
    data.report.notes += weight_notes(config, str(model.dtype).removeprefix("torch."))
    main = config.process_index == 0
    if main:
        print("\n".join(data.report.lines()), flush=True)
    check_training_data(data)
    rows = PairRows(data.train)
    record = RunRecord(config, objective, data.report.as_dict())
    record.content["run"] = start.run
    if objective.needs_reference and config.ref_model_name_or_path == config.model_name_or_path:
        config.ref_model_name_or_path = None  # the model as just loaded, not a second one
    trainer = PreferenceTrainer(
        model,
        config,
        train_dataset=rows,
        eval_dataset=None if data.evaluation is None else PairRows(data.evaluation),
        processing_class=tokenizer,
        objective=objective,
    )
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


def _use_console(trainer: PreferenceTrainer) -> None:
    trainer.remove_callback(PrinterCallback)
    bar = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(ConsoleProgress() if bar else ConsoleLines())
