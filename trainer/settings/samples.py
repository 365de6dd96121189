"""Settings of the answers that evaluations write."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .values import expect_whole, is_number


@dataclass
class SampleSettings:
    """Whether evaluations write answers, and how long and how."""

    #: Answer the first so many prompts of the evaluation set at every evaluation, into
    #: samples.jsonl in ``output_dir``; the report shows them side by side.
    eval_samples: int = 0
    #: Most tokens of such an answer.
    eval_samples_max_new_tokens: int = 128
    #: 0: the likeliest token each time. Above: drawn at this temperature, by ``seed``.
    eval_samples_temperature: float = 0.0

    def check_samples(self) -> None:
        """Raise ``UserError`` for the first value out of range, or that would do nothing."""
        for name, least in (("eval_samples", 0), ("eval_samples_max_new_tokens", 1)):
            expect_whole(name, getattr(self, name), least)
        value = self.eval_samples_temperature
        if not is_number(value) or not 0 <= value < 100:
            raise UserError(f"eval_samples_temperature: expected a number from 0 on, got {value!r}")
        strategy = getattr(self, "eval_strategy", "no")
        evaluates = getattr(strategy, "value", strategy) not in ("no", False, None)
        if self.eval_samples and not (evaluates or getattr(self, "eval_on_start", False)):
            raise UserError(
                "eval_samples: answers are written at evaluations, and there are none; set "
                "eval_strategy: steps and eval_steps"
            )
