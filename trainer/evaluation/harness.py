"""`widemargin evaluate lm-eval`: the Language Model Evaluation Harness, as leaderboards ran it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, expect_whole, refusals
from ..monitor.run_record import versions
from .models import dtype_of, fingerprint, read_model, read_tokenizer
from .results import Records, output_folder, table, write_json
from .settings import HarnessSettings

CHECKED_METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "exact_match,strict-match")


@dataclass(frozen=True)
class Task:
    """A task, its examples (None for the harness's number) and the metric that counts."""

    name: str
    shots: int | None = None
    metric: str | None = None


LEADERBOARDS = {
    "leaderboard-v1": (
        Task("arc_challenge", 25, "acc_norm,none"),
        Task("hellaswag", 10, "acc_norm,none"),
        Task("mmlu", 5, "acc,none"),
        Task("truthfulqa_mc2", 0, "acc,none"),
        Task("winogrande", 5, "acc,none"),
        Task("gsm8k", 5, "exact_match,strict-match"),
    ),
    "leaderboard-v2": (Task("leaderboard"),),
}
"""The Open LLM Leaderboards. v1's score is the mean of its six; v2's group brings its own shots
(BBH 3, GPQA 0, MMLU-Pro 5, MuSR 0, IFEval 0, MATH level 5 4)."""


def lm_eval(
    model: str,
    tasks: str,
    settings: HarnessSettings,
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run tasks one after the other; print their scores and write ``lm_eval.json``.

    Finished tasks are kept: the same command goes on after them.

    Args:
        tasks: a key of `LEADERBOARDS`, or names of the harness's tasks, between commas.
        limit: questions of each task, for a trial; None for all.
        include_path: a folder with your own tasks.
    """
    chosen = _chosen_tasks(tasks, limit, include_path)
    manager = _task_manager(chosen, include_path)
    tokenizer = read_tokenizer(settings, model)
    chats = _uses_chat_template(settings, tasks, tokenizer)
    identity = asdict(settings) | {
        "tasks": tasks,
        "limit": limit,
        "apply_chat_template": chats,
        "dtype": dtype_of(settings),
        "model_fingerprint": fingerprint(settings, model),
    }
    del identity["device"], identity["batch_size"]
    folder = output_folder(model, "lm-eval", out)
    harness = None
    with Records(folder, "tasks", identity) as records:
        for task in chosen:
            if task.name in records.done:
                continue
            harness = harness or _harness_model(model, settings, tokenizer)
            results = _run_task(task, harness, manager, settings, limit, chats)
            records.append([{"id": task.name, "results": results}])
        scores = {task.name: records.done[task.name]["results"] for task in chosen}
    result = {
        "model": model,
        "tasks": tasks,
        "limit": limit,
        "apply_chat_template": chats,
        "average": _average(chosen, scores),
        "scores": scores,
        "versions": versions() | {"lm-eval": version("lm-eval")},
    }
    path = write_json(folder / "lm_eval.json", result)
    print("\n".join([*_lines(chosen, result), f"Written: {path}"]))
    return result


def _chosen_tasks(tasks: str, limit: int | None, include_path: Path | None) -> tuple[Task, ...]:
    """The tasks that a leaderboard's name or a list of names stands for."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; pip install 'widemargin[eval]'")
    if limit is not None:
        expect_whole("--limit", limit, 1)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    chosen = LEADERBOARDS.get(tasks) or tuple(Task(t) for t in tasks.split(",") if t.strip())
    if not chosen:
        raise UserError(f"--tasks: expected {' or '.join(LEADERBOARDS)}, or names of tasks")
    return chosen


def _uses_chat_template(settings: HarnessSettings, tasks: str, tokenizer: Any) -> bool:
    """Whether questions are rendered as chats: as set, else for leaderboard v2 alone."""
    chats = settings.apply_chat_template
    if chats is None:
        chats = tasks == "leaderboard-v2" and bool(tokenizer.chat_template)
    if chats and not tokenizer.chat_template:
        raise UserError("apply_chat_template: the tokenizer has no chat template; set it to false")
    return chats


def _task_manager(tasks: tuple[Task, ...], include_path: Path | None) -> Any:
    """Finds the tasks; a folder that has them all spares reading the harness's thousands."""
    task_manager = import_module("lm_eval.tasks").TaskManager

    folder = None if include_path is None else str(include_path)
    unknown: list[str] = []
    for defaults in (False, True) if folder else (True,):
        manager = task_manager(include_path=folder, include_defaults=defaults)
        known = set(manager.all_tasks)
        unknown = [task.name for task in tasks if task.name not in known]
        if not unknown:
            return manager
    raise UserError(
        f"--tasks: the harness has no {', '.join(unknown)}; `lm_eval ls tasks` shows what it has, "
        "and --include-path adds a folder with your own"
    )


def _harness_model(model: str, settings: HarnessSettings, tokenizer: Any) -> Any:
    harness_model = import_module("lm_eval.models.huggingface").HFLM

    loaded = read_model(settings, model)
    return harness_model(pretrained=loaded, tokenizer=tokenizer, batch_size=settings.batch_size)


def _run_task(
    task: Task,
    harness: Any,
    manager: Any,
    settings: HarnessSettings,
    limit: int | None,
    chats: bool,
) -> dict[str, dict[str, float]]:
    """The metrics of the task, and of the subtasks of a group, by name."""
    simple_evaluate = import_module("lm_eval").simple_evaluate

    shots = task.shots if settings.num_fewshot is None else settings.num_fewshot
    print(f"{task.name}: {'its own' if shots is None else shots} examples", flush=True)
    kinds = (ValueError, OSError, ImportError, RuntimeError, KeyError)
    with refusals(f"task {task.name}: the harness cannot run it", *kinds):
        evaluated = simple_evaluate(
            model=harness,
            tasks=[task.name],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chats,
            fewshot_as_multiturn=chats,
            log_samples=False,
        )
    return {
        name: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        for name, metrics in (evaluated or {}).get("results", {}).items()
    }


def _score(task: Task, metrics: dict[str, float]) -> tuple[str, float | None]:
    """The metric that counts, and its value."""
    names = CHECKED_METRICS if task.metric is None else (task.metric,)
    for name in names:
        if name in metrics:
            return name, metrics[name]
    return "", None


def _average(tasks: tuple[Task, ...], scores: dict[str, Any]) -> float | None:
    """The mean over tasks in percent, as leaderboard v1 has it; None if one has no score."""
    if any(task.metric is None for task in tasks):
        return None
    values = [_score(task, scores[task.name].get(task.name, {}))[1] for task in tasks]
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if len(known) == len(values) else None


def _lines(tasks: tuple[Task, ...], result: dict[str, Any]) -> list[str]:
    rows = []
    for task in tasks:
        for name, metrics in result["scores"][task.name].items():
            if task.metric is not None and name != task.name:
                continue  # MMLU's 57 subjects are in the file
            metric, value = _score(task, metrics)
            if value is not None:
                error = metrics.get(metric.replace(",", "_stderr,", 1))
                rows.append((name, metric.partition(",")[0], value, error))
    lines = [table(("task", "metric", "score", "standard error"), rows)]
    if result["average"] is not None:
        lines.append(f"average: {result['average']:.2f}")
    if result["limit"] is not None:
        lines.append(f"A trial: {result['limit']:,} questions of each task")
    return lines
