"""Answers to the same few prompts at every evaluation of a run, for reading while it trains."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from ..data.chat import pad_token
from ..model.adapters import bare_model
from ..model.generation import Completion, Decoding, complete, stop_ids
from ..model.loading import vocabulary_size
from .collapse import SAMPLED_REPETITION, SAMPLED_TOKENS, repetition
from .margins import SAMPLES_FILE
from .observer import append

PROMPTS_AT_ONCE = 16
FIGURES = {SAMPLED_TOKENS: "tokens", SAMPLED_REPETITION: "repetition"}
"""What is logged of the rows: their means."""
logger = logging.getLogger(__name__)


class SampleWriter(TrainerCallback):
    """Writes the answers on the first rank; all ranks log their length and repetition.

    Where the weights are split over the ranks (ZeRO-3, FSDP) every rank would have to take part in
    every token, so nothing is written there, and one line says so.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer  # a PreferenceTrainer, whose module is above this one
        self.writes = not (trainer.is_fsdp_enabled or _is_zero3(trainer))
        if not self.writes and trainer.args.process_index == 0:
            logger.warning(
                "eval_samples: no answers are written under ZeRO-3 or FSDP, whose weights lie in "
                "pieces; `widemargin evaluate` answers questions with saved checkpoints"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not (self.writes and trainer.is_in_train):
            return
        figures: list[dict[str, float]] = [{}]
        with trainer.observer.throughput.paused():
            if args.process_index == 0:
                rows = self.answers(state.global_step)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                append(Path(args.output_dir) / SAMPLES_FILE, "".join(lines))
                figures[0] = {key: fmean(row[n] for row in rows) for key, n in FIGURES.items()}
            if args.world_size > 1:
                dist.broadcast_object_list(figures)
        trainer.log(figures[0])

    def answers(self, step: int) -> list[dict[str, Any]]:
        """One row a prompt: the model's answer now, the chosen answer, and the pair's margin."""
        args: Any = self.trainer.args
        tokenizer: Any = self.trainer.processing_class
        pairs: Any = self.trainer.eval_dataset
        rows = [pairs[i] for i in range(min(args.eval_samples, len(pairs)))]
        prompts = [[int(token) for token in row["prompt_ids"]] for row in rows]
        completions: list[Completion] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            batch = prompts[start : start + PROMPTS_AT_ONCE]
            completions += self._complete(batch, [args.seed + start + i for i in range(len(batch))])
        return [
            {
                "step": step,
                "index": i,
                "prompt": tokenizer.decode(prompts[i], skip_special_tokens=True),
                "answer": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                "tokens": len(completion.token_ids),
                "repetition": repetition(completion.token_ids),
                "finished": completion.stopped,
                "margin": dict(enumerate(self.trainer.reward_metrics.margins)).get(i),
                "chosen": tokenizer.decode(row["chosen_ids"], skip_special_tokens=True),
            }
            for i, (row, completion) in enumerate(zip(rows, completions, strict=True))
        ]

    def _complete(self, prompts: list[list[int]], seeds: list[int]) -> list[Completion]:
        trainer, args = self.trainer, self.trainer.args
        # Not peft's wrapper, whose generation would leave its settings on the model inside.
        model: Any = bare_model(trainer.accelerator.unwrap_model(trainer.model))
        tokenizer = trainer.processing_class
        decoding = Decoding(
            stop_ids(tokenizer, model.generation_config),
            pad_token(tokenizer, vocabulary_size(model)),
            args.eval_samples_max_new_tokens,
            float(args.eval_samples_temperature),
        )
        with trainer.compute_loss_context_manager():
            return complete(model, prompts, decoding, seeds)


def _is_zero3(trainer: Trainer) -> bool:
    if not trainer.is_deepspeed_enabled:
        return False
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3
