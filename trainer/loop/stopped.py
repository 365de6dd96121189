"""The end of a run before its last step: saved, and with an exit status of its own."""

from __future__ import annotations

from pathlib import Path


class Stopped(SystemExit):
    """The run is saved, and the process is to end with a status that is not 0.

    A run that others wait for has not finished.

    Args:
        code: the exit status.
        reason: why, as the beginning of a sentence that goes on with "after step …".
        problem: why there is no ``checkpoint``.
        advice: what to do next.
        quiet: this rank says nothing; the first one speaks for all.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        step: int,
        checkpoint: Path | None,
        problem: str | None,
        advice: str,
        *,
        quiet: bool = False,
    ) -> None:
        super().__init__(code)
        saved = f"saved in {checkpoint}" if problem is None else f"and nothing was saved: {problem}"
        self.message = f"{reason} after step {step}, {saved}; {advice}"
        self.quiet = quiet

    def __str__(self) -> str:
        return self.message
