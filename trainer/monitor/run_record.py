"""``run.json``: what the report and a reader need to know of a run, package versions included."""

from __future__ import annotations

import dataclasses
import json
import platform
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from ..files import write_text
from ..objectives import Objective
from ..settings.coercion import is_secret
from ..settings.config import PreferenceConfig, defaults_of


class RunRecord:
    """The content of ``run.json``, and its file.

    Args:
        config: the settings as given, before a trainer adjusts any.
        objective: the run's.
        data: what became of its data sets, as plain values.
    """

    def __init__(
        self, config: PreferenceConfig, objective: Objective, data: dict[str, Any]
    ) -> None:
        self.path = Path(config.output_dir) / "run.json"
        self.content: dict[str, Any] = {
            **describe_run(config, objective, data),
            "device": str(config.device),
            "mixed_precision": config.mixed_precision,  # the settings' or the launcher's
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "summary": {},
        }

    def write(self, **summary: float) -> None:
        self.content["summary"].update(summary)
        write_text(self.path, json.dumps(self.content, indent=2) + "\n")


def describe_run(
    config: PreferenceConfig, objective: Objective, data: dict[str, Any]
) -> dict[str, Any]:
    """What makes the run what it is: settings, objective, data and versions."""
    return {
        "settings": changed_settings(config),
        "objective": objective_facts(objective),
        "data": data,
        "versions": versions(),
    }


def objective_facts(objective: Objective) -> dict[str, Any]:
    """The objective's name and hyperparameters."""
    return {"name": objective.name, **dataclasses.asdict(objective.hyperparameters)}


def changed_settings(config: PreferenceConfig) -> dict[str, Any]:
    """Settings somebody gave or a run adjusted, as plain values; secrets are left out."""
    changed = {}
    for name, default in defaults_of(type(config)).items():
        value: Any = getattr(config, name, default)
        if name in config.filled_in:  # unless it was changed afterwards, as by the planner
            default = config.filled_in[name]
        elif isinstance(value, AcceleratorConfig):  # which is filled up
            default = type(value)()
        value = plain(value)
        if value != plain(default) and not is_secret(name):
            changed[name] = value
    return changed


def plain(value: Any) -> Any:
    """The value as JSON and YAML have it."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, AcceleratorConfig):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {str(plain(key)): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(part) for part in value]
    return value if isinstance(value, int | float | str | None) else str(value)


PACKAGES = ("widemargin", "torch", "triton", "transformers", "accelerate", "datasets", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on."""
    present = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            present[package] = version(package)
        except PackageNotFoundError:
            continue
    return present
