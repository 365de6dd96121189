"""The settings of a run on another machine: what that one must have is not asked of this one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..settings.config import PreferenceConfig
from ..settings.files import build_config, parse_overrides, read_yaml
from ..settings.published.translation import merge, translate

ELSEWHERE = (
    *("attn_implementation", "head_backend", "use_liger_kernel", "report_to", "tf32"),
    *("load_in_4bit", "load_in_8bit", "use_cpu", "deepspeed", "fsdp", "fsdp_config"),
)
"""Settings that are checked against the machine they are read on; put back unchecked."""


def read_settings(path: str, overrides: Sequence[str] = ()) -> PreferenceConfig:
    """As `load_config`, without what depends on this machine's GPUs and packages.

    Raises:
        UserError: as `load_config`.
    """
    settings = translate(merge(read_yaml(Path(path)), parse_overrides(overrides)), [])
    elsewhere = {name: settings.pop(name) for name in ELSEWHERE if name in settings}
    for name in ("load_in_4bit", "load_in_8bit", "use_cpu"):
        if not isinstance(elsewhere.get(name, False), bool | None):
            raise UserError(f"{name}: expected true or false, got {elsewhere[name]!r}")
    attention = elsewhere.get("attn_implementation")
    if not isinstance(attention, str | None):
        raise UserError(f"attn_implementation: expected a name, got {attention!r}")
    config: Any = build_config(settings | {"use_cpu": True, "report_to": "none"})
    config.use_cpu = False
    for name, value in elsewhere.items():
        setattr(config, name, value)
    return config
