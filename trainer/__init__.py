"""Preference training: objectives, data, model head, trainer, command line and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings.config import PreferenceConfig
    from .trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer", "__version__"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import the trainer when it is asked for: the command line's --help need not wait for it."""
    if name == "PreferenceConfig":
        from .settings.config import PreferenceConfig

        return PreferenceConfig
    if name == "PreferenceTrainer":
        from .trainer import PreferenceTrainer

        return PreferenceTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
