"""Answers to the same few prompts at every evaluation of a run, for reading while it trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, TrainerCallback

from ..model.adapters import bare_model
from .margins import SAMPLES_FILE
from .recorder import append

if TYPE_CHECKING:
    from ..trainer import PreferenceTrainer

PROMPTS_AT_ONCE = 16
logger = logging.getLogger(__name__)


class SampleWriter(TrainerCallback):
    """Writes the answers, on the first rank alone: the others need not wait for one another.

    Where the weights lie in pieces over the ranks (ZeRO-3, FSDP) every rank would have to take
    part in every token, so nothing is written there, and one line says so.
    """

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer
        self.whole = not (trainer.is_fsdp_enabled or _is_zero3(trainer))
        if not self.whole and trainer.args.process_index == 0:
            logger.warning(
                "eval_samples: no answers are written under ZeRO-3 or FSDP, whose weights lie in "
                "pieces; `widemargin evaluate` answers questions with saved checkpoints"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not (self.whole and trainer.is_in_train and args.process_index == 0):
            return
        with trainer._throughput.paused():
            rows = self.answers(state.global_step)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            append(Path(args.output_dir) / SAMPLES_FILE, "".join(lines))

    def answers(self, step: int) -> list[dict[str, Any]]:
        """One row a prompt: what the model answers now, and the chosen answer beside it."""
        args: Any = self.trainer.args
        tokenizer: Any = self.trainer.processing_class
        pairs: Any = self.trainer.eval_dataset
        rows = [pairs[i] for i in range(min(args.eval_samples, len(pairs)))]
        prompts = [[int(token) for token in row["prompt_ids"]] for row in rows]
        found = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            found += self._complete(prompts[start : start + PROMPTS_AT_ONCE], args.seed + start)
        return [
            {
                "step": step,
                "index": i,
                "prompt": tokenizer.decode(prompts[i], skip_special_tokens=True),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "finished": finished,
                "chosen": tokenizer.decode(row["chosen_ids"], skip_special_tokens=True),
            }
            for i, (row, (ids, finished)) in enumerate(zip(rows, found, strict=True))
        ]

    def _complete(self, prompts: list[list[int]], seed: int) -> list[tuple[list[int], bool]]:
        """Continue each prompt up to a token that ends an answer, which is left out."""
        from ..data.chat import pad_token  # which reads the settings, and so this module

        trainer, args = self.trainer, self.trainer.args
        # Not peft's wrapper, whose generation would leave its settings on the model inside.
        model: Any = bare_model(trainer.accelerator.unwrap_model(trainer.model))
        tokenizer: Any = trainer.processing_class
        pad = pad_token(tokenizer)
        width = max(map(len, prompts))
        stops, room = self._stops(model), _room(model, width, args)
        if room < 1:
            return [([], False) for _ in prompts]
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        temperature = float(args.eval_samples_temperature)  # pyright: ignore
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config: Any = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=room,
            eos_token_id=stops or None,
            pad_token_id=pad,
            **sampling,
        )
        with _aside(model, config), torch.no_grad(), trainer.compute_loss_context_manager():
            torch.manual_seed(seed)
            device = model.device
            written = model.generate(ids.to(device), attention_mask=mask.to(device))
        answers = []
        for row in written[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), None)
            answers.append((row[:end], end is not None))
        return answers

    def _stops(self, model: Any) -> list[int]:
        from ..evaluation.settings import AnswerSettings
        from ..model.generation import stop_ids

        tokenizer: Any = self.trainer.processing_class
        return stop_ids(AnswerSettings(), tokenizer, model.generation_config)


@contextmanager
def _aside(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Generate in evaluation mode with ``config``; training finds all as it left it.

    Both the random numbers and what the model itself says of generation.
    """
    training, own = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        model.generation_config = config
        try:
            yield
        finally:
            model.generation_config = own
            model.train(training)


def _room(model: Any, width: int, args: Any) -> int:
    """Tokens that an answer can have within the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = args.eval_samples_max_new_tokens
    return most if context is None else min(most, context - width)


def _is_zero3(trainer: PreferenceTrainer) -> bool:
    if not trainer.is_deepspeed_enabled:
        return False
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3
