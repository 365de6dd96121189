"""``python -m tests.trl_situations``: tries every situation, and prints what became of it."""

from __future__ import annotations

import argparse
import collections
import logging
import os
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers

from tests.trl_situations.situation import attempt
from tests.trl_situations.table import TABLE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.trl_situations", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="situations with it in the name")
    only = parser.parse_args(argv).only
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    counts: collections.Counter[str] = collections.Counter()
    for situation in (it for it in TABLE if only in str(it)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                    line = attempt(situation, Path(folder))
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                line = f"{type(error).__name__} in {Path(place.filename).name}: {error}"
                became = "neither"
            else:
                as_expected = situation.said in line and bool(situation.said) == bool(line)
                became = ("refused" if line else "ran") if as_expected else "neither"
        counts[became] += 1
        print(f"{became:<8} {situation}{': ' * bool(line)}{line[:300]}", flush=True)
    print(
        f"{counts.total()} situations of TRL's tests: {counts['ran']} run, {counts['refused']} are "
        f"refused with a line that says what to do, {counts['neither']} neither"
    )
    return int(counts["neither"] > 0)


if __name__ == "__main__":
    sys.exit(main())
