"""The command line of `widemargin plan`; quick to import."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import refusals
from .chips import Chip

ENGINES = ("zero3", "zero2", "fsdp2", "ddp")

HELP = """\
Estimate a run's memory and time before it starts, and name the change that helps if it does not
fit. The model's config is enough: the estimate needs no weights and no GPU.

  widemargin plan configs/train/lmpo-llama3-8b-instruct.yaml --gpus 4 --gpu-memory 80 \\
    --mean-lengths 190,330,300

Any setting can be overridden with --key=value, as in train.
"""


def add_plan(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "plan",
        help="estimate memory, time and scaling before a run starts",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml")
    add("--gpus", type=_count, default=1, help="ranks, one on each GPU (default 1)")
    add(
        "--gpu-memory",
        type=_gib,
        default=80.0,
        help="memory of one GPU in GiB: 80, 80GB or 81920MiB (default 80)",
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument("--accelerate", type=Path, metavar="FILE", help="accelerate's config")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        help="a config of configs/accelerate (default: zero3 on several GPUs)",
    )
    add("--model-config", type=Path, metavar="FILE", help="a config.json, or a folder with one")
    add(
        "--mean-lengths",
        type=_means,
        metavar="P,C,R",
        help="mean tokens of prompt, chosen and rejected",
    )
    add("--pairs", type=_count, help="number of training pairs, if the data is not on this machine")
    add("--tflops", type=_positive, help="peak of a GPU, dense (default 312, A100)")
    add("--mfu", type=_positive, default=Chip.mfu, help=f"share of that peak (default {Chip.mfu})")
    add("--pairs-per-s", type=_positive, help="measured speed of all GPUs; replaces those two")
    add("--bench", type=Path, metavar="FILE", help="JSON of bench.training with one GPU's pairs/s")
    add(
        "--gpus-per-node",
        type=_count,
        default=Chip.per_node,
        help="GPUs of one machine (default 8)",
    )
    add(
        "--node-bandwidth",
        type=_positive,
        default=Chip.node_gb_s,
        help="GB/s of a GPU within a machine",
    )
    add(
        "--network-bandwidth",
        type=_positive,
        default=Chip.network_gb_s,
        help="GB/s of a GPU between machines",
    )
    add("--json", type=Path, metavar="FILE", help="also write the plan to this file")


def run_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the estimate; 0 if the run fits, 1 if it does not."""
    from .estimate import estimate
    from .text import as_dict, page

    result = estimate(options, overrides)
    print("\n".join(page(result)))
    if options.json is not None:
        text = json.dumps(as_dict(result), indent=2) + "\n"
        with refusals(f"--json {options.json}", OSError):
            options.json.write_text(text, encoding="utf-8")
    return 0 if result.fits else 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _gib(text: str) -> float:
    """A size as it is written: makers and tools call GiB GB, so all G are taken for GiB."""
    number, mega = re.findall(r"(?is)\A(.*?)\s*(?:G(?:i?B)?|(M(?:i?B)?))?\Z", text)[0]
    try:
        return _positive(number) / (1024 if mega else 1)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected a size in GiB such as 80, 80GB or 81920MiB, got {text}"
        ) from None


def _means(text: str) -> tuple[float, float, float]:
    try:
        prompt, chosen, rejected = (_positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"expected mean prompt,chosen,rejected tokens such as 190,330,300, got {text}"
        ) from None
    return prompt, chosen, rejected
