"""Where results go, and how they look in a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, refusals
from ..text import printable


def output_folder(model: str, benchmark: str, out: Path | None) -> Path:
    """``out``, or ``MODEL/evaluation/BENCHMARK`` (``outputs/evaluation/NAME/...`` off the hub).

    The folder is made. A place that cannot be written is a ``UserError``.
    """
    if out is None:
        local = Path(model).expanduser()
        base = local / "evaluation" if local.is_dir() else Path("outputs/evaluation", name(model))
        out = base / benchmark
    with refusals(f"out {out}: cannot be written; give another folder with --out", OSError):
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    return out


def name(model: str) -> str:
    """The last part of a model's path or hub name."""
    return Path(model).expanduser().resolve().name if Path(model).exists() else Path(model).name


def write_text(path: Path, text: str) -> Path:
    """Put ``text`` at ``path`` whole or not at all."""
    with refusals(f"{path}: cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    return path


def write_json(path: Path, content: Any) -> Path:
    """``content`` as indented JSON; what is not finite becomes null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    return write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns, the first to the left; numbers to three digits, nothing as a dash."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value), 60)


def count(option: str, value: Any) -> None:
    """Raise ``UserError`` unless ``value`` is a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{option}: expected a whole number from 1 on, got {value!r}")
