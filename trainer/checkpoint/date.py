"""The date that a chat template writes: the same on all ranks, and on every day of a run."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.template import writes_date
from .files import BrokenCheckpoint, newest_complete, read_manifest
from .resume import on_first_rank

if TYPE_CHECKING:
    from ..settings.config import PreferenceConfig


def settle_date(config: PreferenceConfig, tokenizer: Any) -> None:
    """Set ``chat_date`` where the chat template writes the date: the checkpoint's, or today's.

    The date is the same on all ranks, and on every day on which the run goes on.
    """
    if config.chat_date is not None or not writes_date(tokenizer):
        return
    config.chat_date = on_first_rank(
        config, lambda: _saved_date(config) or datetime.date.today().isoformat()
    )


def _saved_date(config: PreferenceConfig) -> str | None:
    """The date of the checkpoint that the run would go on from."""
    named = config.resume_from_checkpoint
    folder = Path(named) if isinstance(named, str) and named not in ("auto", "True") else None
    if folder is None:
        folder, *_ = newest_complete(Path(str(config.output_dir)), hashes=False)
    try:
        return (
            None
            if folder is None
            else read_manifest(folder)["run"].get("settings", {}).get("chat_date")
        )
    except BrokenCheckpoint:
        return None
