"""What a run shows in the terminal: a progress bar, and one short line per log."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback

COLUMNS = [
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("rewards/margins", "margin", "{:+.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("learning_rate", "lr", "{:.1e}"),
    ("pairs_per_s", "pairs/s", "{:.1f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("tokens/computed_vs_padded", "of padded", "{:.2f}"),
    ("mfu", "MFU", "{:.0%}"),
    ("peak_memory_mib", "MiB", "{:,.0f}"),
]


class ConsoleProgress(ProgressCallback):
    """transformers' progress bar with the few figures worth watching."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        line = log_line(state.global_step, logs)
        if line:
            self.training_bar.write(line)


class ConsoleLines(TrainerCallback):
    """The same figures where ``disable_tqdm`` asks for no bar, as in the logs of a cluster."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and (line := log_line(state.global_step, logs)):
            print(line, flush=True)


def log_line(step: int, logs: dict[str, Any]) -> str:
    """The main figures of one log entry; "" for one that has none."""
    prefix = next((prefix for prefix in ("", "eval_") if f"{prefix}loss" in logs), None)
    if prefix is None:
        return ""
    parts = [f"step {step:>5} {'held out' if prefix else 'training':8}"]
    for key, label, form in COLUMNS:
        value = logs.get(prefix + key)
        if isinstance(value, int | float):
            parts.append(f"{label} {form.format(value)}")
    return "  ".join(parts)
