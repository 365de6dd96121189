"""Carry out the studies: `python -m bench.studies [tail] [length] [flips]`.

Each run is a process that writes one JSON file, whole or not at all: what is there is not done
again, so a study that was stopped goes on where it was. Tables and pictures are made of what there
is, at the end or by `--report`. Three seeds of all studies take hours on two cores.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.record import RESULTS, ROOT, Commit, find_commit, refused
from bench.studies.preparing import MAX_LENGTH, prepare_model, prepare_pairs
from bench.studies.questions import STUDIES, Run
from bench.studies.report import write_report

DATA = ROOT.parent / "shared" / "data"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--model", type=Path, default=DATA / "small_lm", help="a model's folder")
    parser.add_argument("--train", type=Path, default=DATA / "judged_pairs_train.jsonl.gz")
    parser.add_argument("--test", type=Path, default=DATA / "judged_pairs_test.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--steps", type=int, help="of every run, to try it out")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies")
    parser.add_argument("--allow-dirty", action="store_true", help="store uncommitted results")
    parser.add_argument("--report", action="store_true", help="only tables and pictures")
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"unknown studies: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    for path in (options.model, options.train, options.test):
        if not path.exists() and not options.report:
            parser.error(f"{path} is not there; name others with --model, --train and --test")
    return options


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """All runs, seed by seed, so that a study cut short has whole seeds."""
    for study in options.studies or STUDIES:
        for seed in range(options.seeds):
            for run in STUDIES[study](seed):
                yield dataclasses.replace(run, steps=options.steps) if options.steps else run


def record_path(out: Path, run: Run) -> Path:
    name = run.name.replace(", ", "-").replace(" ", "-").replace("%", "pc")
    return out / run.study / f"{name}.json"


def carry_out(run: Run, options: argparse.Namespace, shared: dict[str, Any]) -> str | None:
    """Start the run's process and wait; what went wrong, if anything did."""
    out = record_path(options.out, run)
    work = options.out / "work"
    spec = work / f"{out.parent.name}-{out.stem}.json"
    model = prepare_model(options.model, run.sharpen, work / f"model-x{run.sharpen:g}")
    content = shared | {"run": dataclasses.asdict(run), "model_dir": str(model), "out": str(out)}
    spec.write_text(json.dumps(content))
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bench.studies.worker", str(spec)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    minutes = (time.monotonic() - begin) / 60
    problem = done.stderr.strip().splitlines()[-1:] if done.returncode else None
    print(f"{run.study}: {run.name}: {problem or f'{minutes:.1f} min'}", flush=True)
    return None if problem is None else done.stderr


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out = options.out.resolve()
    if not options.report:
        commit: Commit = find_commit()
        if refused(options.out, commit, options.allow_dirty):
            return 2
        runs = list(planned(options))
        left = [run for run in runs if not record_path(options.out, run).exists()]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are in {options.out} already")
        if left and (problems := carry_out_all(left, options, commit)):
            print(problems[0], file=sys.stderr)
            return 1
    for path in write_report(options.out):
        print(f"Written: {path}")
    return 0


def carry_out_all(runs: list[Run], options: argparse.Namespace, commit: Commit) -> list[str]:
    """Several at a time; the messages of those that failed."""
    work = options.out / "work"
    for run in runs:
        record_path(options.out, run).parent.mkdir(parents=True, exist_ok=True)
    sources = {"train": options.train, "test": options.test}
    shared: dict[str, Any] = {
        key: str(prepare_pairs(path, options.model, MAX_LENGTH[key], work / f"{key}.jsonl"))
        for key, path in sources.items()
    }
    shared |= {"threads": options.threads, "commit": dataclasses.asdict(commit)}
    for factor in {run.sharpen for run in runs}:  # here, not by two runs at once
        prepare_model(options.model, factor, work / f"model-x{factor:g}")
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda run: carry_out(run, options, shared), runs)
    return [problem for problem in found if problem]


if __name__ == "__main__":
    sys.exit(main())
