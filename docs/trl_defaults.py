"""``python -m docs.trl_defaults``, where TRL is installed: its settings' defaults, as JSON.

`migration_table` compares them with ours. Written again when TRL's version in ``pyproject.toml``
changes; TRL itself is only in the benchmarks' environment.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("trl_defaults.json")


def read() -> dict[str, Any]:
    """``version``, and by class the defaults of the settings that are not transformers' own."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def defaults_of(kind: type) -> dict[str, Any]:
    """Each field's default, of plain types."""
    values = {
        each.name: each.default if each.default_factory is dataclasses.MISSING else None
        for each in dataclasses.fields(kind)
    }
    for each in dataclasses.fields(kind):
        if each.default_factory is not dataclasses.MISSING:
            values[each.name] = each.default_factory()
    return {name: getattr(value, "value", value) for name, value in values.items()}


def write() -> None:
    import trl
    from transformers import TrainingArguments
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.kto_config import KTOConfig

    of_transformers = defaults_of(TrainingArguments)
    kinds = {
        kind.__name__: {
            name: value
            for name, value in defaults_of(kind).items()
            if name not in of_transformers or of_transformers[name] != value
        }
        for kind in (DPOConfig, CPOConfig, ORPOConfig, KTOConfig)
    }
    FILE.write_text(json.dumps({"version": trl.__version__} | kinds, indent=1) + "\n")


if __name__ == "__main__":
    write()
