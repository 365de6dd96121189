"""Answers written at evaluations, as HTML: side by side over steps, or over runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..monitor.history import Run, number
from .groups import Group
from .page import text
from .ridges import spread_out

MOST_STEPS, MOST_PROMPTS = 5, 12


def sample_strips(run: Run) -> str:
    """For each prompt a strip of its answers, from the first step to the last."""
    strips = []
    for prompt, answers in by_prompt(run)[:MOST_PROMPTS]:
        shown = spread_out(list(answers), MOST_STEPS)
        cells = [_answer(f"step {step:g}", answers[step]) for step in shown]
        strips.append(_strip(prompt, cells))
    return "".join(strips)


def compared_samples(groups: Sequence[Group]) -> str:
    """For each prompt that all groups' first runs answered, their last answers."""
    answered = [dict(by_prompt(group.runs[0])) for group in groups]
    prompts = [prompt for prompt in answered[0] if all(prompt in each for each in answered)]
    strips = []
    for prompt in prompts[:MOST_PROMPTS]:
        cells = []
        for group, answers in zip(groups, answered, strict=True):
            step, answer = list(answers[prompt].items())[-1]
            cells.append(_answer(f"{group.label}, step {step:g}", answer, group.colour))
        strips.append(_strip(prompt, cells))
    return "".join(strips)


def by_prompt(run: Run) -> list[tuple[str, dict[float, dict[str, Any]]]]:
    """Every prompt with its answers by step; a step answered again counts once."""
    prompts: dict[str, dict[float, dict[str, Any]]] = {}
    for row in run.step_samples:
        prompts.setdefault(str(row["prompt"]), {})[row["step"]] = row
    return [(prompt, dict(sorted(answers.items()))) for prompt, answers in prompts.items()]


def _answer(title: str, row: Mapping[str, Any], colour: str = "") -> str:
    length = f" · {row['tokens']} tokens" if isinstance(row.get("tokens"), int) else ""
    length += "" if row.get("finished", True) else ", cut"
    margin = number(row.get("margin"))
    length += "" if margin is None else f" · margin {margin:+.2f}"
    mark = f'<span class="{colour}"><i class="mark"></i></span>' if colour else ""
    heading = f"<h4>{mark}{text(title)}<small>{length}</small></h4>"
    return f"<div>{heading}<p>{text(str(row['answer']).strip())}</p></div>"


def _strip(prompt: str, cells: Sequence[str]) -> str:
    return (
        f'<section class="card strip"><p class="asked">{text(prompt.strip())}</p>'
        f'<div class="across" tabindex="0">{"".join(cells)}</div></section>'
    )
