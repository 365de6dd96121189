"""One run of a study, in a process of its own: `python -m bench.studies.worker SPEC.json`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from widemargin.trainer.model.adapters import bare_model
from widemargin.trainer.monitor.collapse import Watch, repetition

from bench.lib.record import Commit, versions
from bench.studies.preparing import fingerprint
from bench.studies.questions import LEARNING_RATE, Run

CURVES = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_mean_logp": "logps/chosen_mean",
    "rejected_mean_logp": "logps/rejected_mean",
    "active_fraction": "head/active_fraction",
}
"""What is kept of every step, by the name it is logged under."""
ANSWERS_SEED = 20


class Measurements(TrainerCallback):
    """Accuracy by length on the test pairs, and the lengths of sampled answers."""

    def __init__(self, trainer: Any, run: Run, test: Any) -> None:
        self.trainer, self.run, self.test = trainer, run, test
        self.taken: list[dict[str, Any]] = []
        self.reference: Any = None
        """Log-probs before training, where the objective's rewards are against them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.objective.needs_reference:
            self.reference = self.logps(bare_model(self.trainer.model))
        if self.run.seed == 0:  # no other starts anywhere else
            self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == self.run.steps or step % self.run.measure_every == 0:
            self.measure(step)

    def measure(self, step: int) -> None:
        model: Any = bare_model(self.trainer.model)
        facts = {"step": step, **self.accuracies(model)}
        if self.run.answers:
            training = model.training
            facts["answers"] = self.answers(model.eval())
            model.train(training)
        self.taken.append(facts)

    def logps(self, model: Any) -> Any:
        """Of the test pairs."""
        from widemargin.trainer.evaluation.pairs import score_pairs
        from widemargin.trainer.evaluation.settings import PairSettings

        settings = PairSettings(device="cpu", dtype="float32", packing=self.trainer.args.packing)
        training = model.training
        model.eval()
        scored = score_pairs(model, self.test, settings, self.trainer.processing_class.pad_token_id)
        model.train(training)
        return scored

    def accuracies(self, model: Any) -> dict[str, Any]:
        """By the objective's own reward: against the reference where it has one."""
        from widemargin.trainer.evaluation.pair_metrics import measure, pair_margins
        from widemargin.trainer.evaluation.settings import BETAS

        measured = self.logps(model), self.test.lengths, self.reference
        everything = measure(*measured, BETAS)
        kind = "mean_logps" if self.reference is None else "against_reference"
        reward = everything["rewards"][kind]
        facts = {}
        if self.run.settings["objective"] == "simpo":
            margins = pair_margins(*measured)[kind] - self.run.settings["gamma_beta_ratio"]
            losses = np.logaddexp(0.0, -self.run.settings["beta"] * margins)
            facts["loss"] = float(losses.mean())
        return facts | {
            "accuracy": reward["accuracy"],
            "margin": reward["margin"]["mean"],
            "by_length": reward["by_length"],
            "correlation_with_length": reward["correlation_with_length"],
            "mean_logps": everything["mean_logps"],
        }

    def answers(self, model: Any) -> dict[str, Any]:
        """Tokens of answers sampled at temperature 1, with the same random numbers every time."""
        from widemargin.trainer.model.generation import Decoding, complete, stop_ids

        rows = self.test.__getitems__(range(len(self.test)))
        prompts = sorted({tuple(row["prompt_ids"].tolist()) for row in rows}) * self.run.answers
        tokenizer = self.trainer.processing_class
        stops = stop_ids(tokenizer, model.generation_config)
        decoding = Decoding(stops, tokenizer.pad_token_id, self.run.max_new_tokens, temperature=1.0)
        seeds = [ANSWERS_SEED + i for i in range(len(prompts))]
        written = complete(model, [list(prompt) for prompt in prompts], decoding, seeds)
        lengths = [len(answer.token_ids) for answer in written]
        repeated = [repetition(answer.token_ids) for answer in written]
        return {
            "repetition": statistics.fmean(repeated),
            "mean_tokens": statistics.fmean(lengths),
            "median_tokens": statistics.median(lengths),
            "standard_error": statistics.stdev(lengths) / len(lengths) ** 0.5,
            "answers": len(lengths),
            "cut": sum(not answer.stopped for answer in written),
        }


def carry_out(run: Run, model_dir: Path, train: Path, test: Path) -> dict[str, Any]:
    """Train and measure; what came out, as plain values."""
    from widemargin.trainer import PreferenceConfig, PreferenceTrainer
    from widemargin.trainer.data import load_pairs
    from widemargin.trainer.data.table import PairRows
    from widemargin.trainer.model.loading import load_model, load_tokenizer

    fixed = {"learning_rate": LEARNING_RATE, "packing": "prefix_shared"}
    settings: dict[str, Any] = fixed | run.settings
    with tempfile.TemporaryDirectory() as folder:
        config = PreferenceConfig(
            model_name_or_path=str(model_dir),
            dataset=str(train),
            eval_dataset=str(test),
            max_length=max(run.train_length, run.test_length),
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=run.pairs_per_step,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=1,
            seed=run.seed,
            mix_seed=run.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        tokenizer, model = load_tokenizer(config), load_model(config)
        data = load_pairs(config, tokenizer)
        trainer = PreferenceTrainer(
            model, config, train_dataset=data.train, processing_class=tokenizer
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        measurements = Measurements(trainer, run, PairRows(data.evaluation))
        trainer.add_callback(measurements)
        begin = time.monotonic()
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        watch = Watch()
        signs = [str(sign) for entry in trainer.state.log_history for sign in watch.add(entry)]
    return {
        "seconds": round(time.monotonic() - begin),
        "train_pairs": len(data.train or ()),
        "test_pairs": len(data.evaluation or ()),
        "curves": {
            name: [round(float(entry[key]), 6) if key in entry else None for entry in log]
            for name, key in CURVES.items()
        },
        "measurements": measurements.taken,
        "signs_of_collapse": signs,
    }


def main(path: str) -> None:
    """Read a specification, print the run's record as the last line."""
    spec = json.loads(Path(path).read_text())
    run, commit = Run(**spec["run"]), Commit(**spec["commit"])
    paths = {key: Path(spec[key]) for key in ("model_dir", "train", "test")}
    torch.set_num_threads(spec["threads"])
    record = {
        **dataclasses.asdict(run),
        **dataclasses.asdict(commit),
        "versions": versions(),
        "inputs": {key: fingerprint(path) for key, path in paths.items()},
        **carry_out(run, **paths),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1])
