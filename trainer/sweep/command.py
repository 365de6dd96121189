"""`widemargin sweep CONFIG --learning_rate 5e-7,1e-6 --beta 2,2.5`; quick to import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = """\
Train once for every combination of values, one run after the other, and compare the runs:

  widemargin sweep my.yaml --learning_rate 5e-7,1e-6 --beta 2,2.5 --max_steps 200

A setting with several values varies, one with a single value holds for all runs. A list that is one
value stands in brackets: --dataset_splits [train,test]. Each run has a folder in OUT, named by its
values. The same command goes on after a break: finished runs are skipped, a run that was killed
continues from its newest checkpoint. More values can be added to a sweep later.
"""
LAUNCHER_HELP = (
    "command in place of `python -m widemargin.trainer`, which waits for the run; CONFIG and "
    "settings are appended: 'accelerate launch --config_file FILE -m widemargin.trainer'"
)


def add_sweep(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "sweep",
        help="train with every combination of values, and compare the runs",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path)
    parser.add_argument(
        "--out", type=Path, help="folder of the sweep (default: sweep in the config's output_dir)"
    )
    parser.add_argument("--launcher", default="", metavar="COMMAND", help=LAUNCHER_HELP)


def run_sweep(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Carry out the command; 0 if every run has finished."""
    from .runs import sweep

    return sweep(options.config, options.out, options.launcher, arguments)
