"""All benchmarks that a CPU can run, within ten minutes: `python -m bench.all` (`make bench`).

The head, scaling curves, training steps against TRL's trainers for SimPO and for DPO, and planning
in a smaller form, each in a process with a limit of its own; then tables, pictures and a page of
results, `results.md`, in the same folder. With ``--out bench/results``, from a clean tree only,
README's tables and the pages in docs are renewed instead. Whole steps run on the model that
`bench/lib/subject.py` finds. A part that fails or is cut leaves the others as they are, and the
exit status is 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.lib import real_model
from bench.lib.record import ROOT, find_commit, refused
from bench.report import pages as results
from bench.training.contenders import HYBRIDS, LAYOUTS

TOTAL_S = 585
"""Parts begin and are cut so that all end within this; drawing takes a few seconds more."""


@dataclass(frozen=True)
class Part:
    """A benchmark: its module, what it is told, and the seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    file: str
    limit_s: float

    @property
    def module(self) -> str:
        """`bench.training` of both "training-simpo" and "training-real-dpo"."""
        return f"bench.{self.name.partition('-')[0]}"


PARTS = (
    Part("head", ("--budget-s", "15"), "head_cpu.json", 180),
    Part(
        "training-simpo",
        ("--steps", "5", "--warmup", "2", "--budget-s", "70", "--append"),
        "training_cpu.json",
        170,
    ),
    Part("scaling", (), "scaling_cpu.json", 240),
    Part(
        "training-dpo",
        (
            *("--objective", "dpo", "--steps", "4", "--warmup", "1", "--budget-s", "50"),
            *("--contenders", "widemargin-padded", "widemargin-prefix_shared", "trl-dpo"),
            "--append",
        ),
        "training_cpu.json",
        150,
    ),
    Part(
        "planning",
        ("--count", "2000", "--lengths", "200000", "--repeats", "1"),
        "planning.json",
        90,
    ),
)
"""Most wanted first, since what comes late may be cut."""


def _real(name: str, limit_s: float, *arguments: str) -> Part:
    model = ("--model", str(real_model.FOLDER), "--append")
    return Part(f"training-real-{name}", (*model, *arguments), "training_real_cpu.json", limit_s)


_PAIRS = ("--batch", "2", "--steps", "5", "--warmup", "1")
_FOUR = ("--batch", "4", "--steps", "3", "--warmup", "1")
_PROMPTS = (
    *("--trees", "--batch", "12", "--accumulation", "2", "--max-length", "512"),
    *("--steps", "2", "--warmup", "1"),
)
_PROMPT = (  # DPO runs a second model: two prompts take longer than a part may
    *("--trees", "--batch", "6", "--max-length", "512"),
    *("--steps", "2", "--warmup", "1"),
)
_SHARED = ("--contenders", "widemargin-prefix_shared")
REAL_PARTS = (
    _real("simpo", 900, *_PAIRS),
    _real("dpo", 900, *_PAIRS, "--objective", "dpo", *_SHARED, "trl-dpo", "trl-dpo-our-head"),
    _real("simpo-four", 900, *_FOUR, *_SHARED, "trl-cpo"),
    _real("trees", 1200, *_PROMPTS, *_SHARED, "widemargin-trees", "trl-cpo"),
    _real("lora", 600, *_PAIRS, "--lora", *_SHARED, "trl-cpo"),
    _real("checkpointing", 700, *_PAIRS, "--checkpointing", *_SHARED, "trl-cpo"),
    _real(
        *("trees-dpo", 1200, *_PROMPT, "--objective", "dpo"),
        *(*_SHARED, "widemargin-trees", "trl-dpo"),
    ),
)
"""Steps of the real model of `bench/lib/real_model.py` (`make bench-real`), most wanted first."""
REAL_TOTAL_S = 3600


def _hybrid(shape: str, *arguments: str) -> Part:
    ours = ("--contenders", *(f"widemargin-{layout}" for layout in LAYOUTS))
    name = f"training-{shape}" + "-long" * bool(arguments)
    given = ("--shape", shape, *ours, "--steps", "5", "--warmup", "1", "--append", *arguments)
    return Part(name, given, "training_hybrid_cpu.json", 900)


HYBRID_PARTS = tuple(
    _hybrid(shape, *prompts) for shape in HYBRIDS for prompts in ((), ("--long-prompts",))
)
"""Our layouts of small models with recurrent layers, on short and long prompts (`--hybrids`)."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder")
    names = [part.name for part in PARTS]
    real = [part.name for part in REAL_PARTS]
    hybrids = [part.name for part in HYBRID_PARTS]
    every = names + real + hybrids
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--parts", nargs="+", choices=every, default=names, metavar="NAME")
    which.add_argument(
        "--real", action="store_const", const=real, dest="parts", help="steps of the real model"
    )
    text = "steps of small models with recurrent layers"
    which.add_argument("--hybrids", action="store_const", const=hybrids, dest="parts", help=text)
    text = f"default {TOTAL_S}, and {REAL_TOTAL_S} with --real or --hybrids"
    parser.add_argument("--total-s", type=float, help=text)
    parser.add_argument("--allow-dirty", action="store_true", help="store uncommitted results")
    parser.add_argument("--keep-noisy", action="store_true", help="store noisy training steps too")
    return parser.parse_args(arguments)


def run(part: Part, out: Path, limit_s: float, options: argparse.Namespace) -> str:
    """Run it; "done in 12 s", or the reason why it is not."""
    command = [sys.executable, "-m", part.module, *part.arguments, "--out", str(out / part.file)]
    command += ["--allow-dirty"] * options.allow_dirty
    command += ["--keep-noisy"] * (options.keep_noisy and part.module == "bench.training")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | quiet, start_new_session=True)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"cut after {limit_s:.0f} s; rows it had written are kept"
    except BaseException:
        _stop(process)
        raise
    took = f"{time.monotonic() - begin:.0f} s"
    return f"done in {took}" if status == 0 else f"failed with exit status {status} after {took}"


def _stop(process: subprocess.Popen) -> None:
    """The part and its workers, which are a process group of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    if refused(out / "all.json", find_commit(), options.allow_dirty):
        return 2
    short = options.parts[0] in [part.name for part in PARTS]
    default = TOTAL_S if short else REAL_TOTAL_S
    end = time.monotonic() + (options.total_s or default)
    fates: dict[str, str] = {}
    for part in (*PARTS, *REAL_PARTS, *HYBRID_PARTS):
        if part.name not in options.parts:
            continue
        left = min(part.limit_s, end - time.monotonic())
        if left < 5:
            fates[part.name] = "skipped: no time is left"
        else:
            print(f"== {part.name}", flush=True)
            fates[part.name] = run(part, out, left, options)
        print(f"== {part.name}: {fates[part.name]}\n", flush=True)
    if not any(out.glob("*.json")):
        print(json.dumps(fates, indent=1))
        return 1
    status = results.main([str(out)])
    print("\n".join(f"{name:16} {fate}" for name, fate in fates.items()))
    bad = ("failed", "cut", "skipped: no time")
    return 1 if status or any(fate.startswith(bad) for fate in fates.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
