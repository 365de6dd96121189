"""Tables and pictures of what the studies have so far."""

from __future__ import annotations

from pathlib import Path

from bench.lib.record import RESULTS, ROOT
from bench.lib.table import write_into
from bench.studies.pictures import PICTURES
from bench.studies.records import read
from bench.studies.tables import TABLES, provenance

PAGE = ROOT / "docs" / "studies.md"
PUBLISHED = RESULTS / "studies"


def write_report(out: Path) -> list[Path]:
    """Pictures beside the records; tables into docs/studies.md if that is where it reads from.

    Returns:
        the files written; tables of other folders are printed.
    """
    written = []
    for study, table in TABLES.items():
        if not (records := read(out, study)):
            continue
        picture = out / f"{study}.png"
        PICTURES[study](records, picture)
        written.append(picture)
        text = f"{provenance(records)}\n\n{table(records)}"
        if out == PUBLISHED:
            write_into(PAGE, text, f"study-{study}")
        else:
            print(f"\n{text}\n")
    return written + [PAGE] * (out == PUBLISHED)
