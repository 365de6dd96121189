"""Carry out the studies: `python -m bench.studies [tail] [length] [flips] [trees] [real]`.

Each run is a process, whose record is a line in the study's file when it ends: what is there is not
done again, so a study that was stopped goes on with the run it was at. Tables and pictures are made
of what there is, at the end or by `--report`. All studies take about ten hours on two cores.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.lib import real_model
from bench.lib.record import RESULTS, ROOT, Commit, find_commit, refused
from bench.lib.workers import WorkerError, answer_of
from bench.studies.preparing import prepare_model, prepare_pairs
from bench.studies.questions import STUDIES, Run
from bench.studies.records import append, is_done, read
from bench.studies.report import write_report

WORK = ROOT / "outputs" / "studies"
DATA = ROOT.parent / "shared" / "data"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)} (default: all)")
    model_help = "a model's folder (default: the small one, and SmolLM2's for `real`)"
    parser.add_argument("--model", type=Path, help=model_help)
    parser.add_argument("--train", type=Path, default=DATA / "judged_pairs_train.jsonl.gz")
    parser.add_argument("--test", type=Path, default=DATA / "judged_pairs_test.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, such as simpo")
    parser.add_argument("--steps", type=int, help="of every run, to try it out")
    set_help = "for every run, such as use_peft=true; repeat it, and name another --out"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "studies")
    parser.add_argument("--allow-dirty", action="store_true", help="store uncommitted results")
    parser.add_argument("--report", action="store_true", help="only tables and pictures")
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"unknown studies: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    models = {model_of(study, options) for study in options.studies or STUDIES}
    known = [run.arm for study in options.studies or STUDIES for run in STUDIES[study](0)]
    if unknown := set(options.arms or ()) - set(known):
        parser.error(f"unknown arms: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for path in () if options.report else (*sorted(models), options.train, options.test):
        if not path.exists():
            hint = "make real-model makes it" if path == real_model.FOLDER else "it is not there"
            parser.error(f"{path}: {hint}; or name others with --model, --train and --test")
    return options


def model_of(study: str, options: argparse.Namespace) -> Path:
    return options.model or (real_model.FOLDER if study == "real" else DATA / "small_lm")


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """All runs, seed by seed, so that a study cut short has whole seeds."""
    from widemargin.trainer.settings.coercion import as_number
    from widemargin.trainer.settings.files import parse_overrides

    overrides = parse_overrides(f"--{each}" for each in options.set)
    given = {key: as_number(value) for key, value in overrides.items()}
    for study in options.studies or STUDIES:
        for seed in range(options.seeds):
            for run in STUDIES[study](seed):
                if options.arms and run.arm not in options.arms:
                    continue
                steps = options.steps or run.steps
                yield dataclasses.replace(run, steps=steps, settings=run.settings | given)


def prepare(run: Run, options: argparse.Namespace) -> dict[str, str]:
    """The files that a run reads, by name; each is made once."""
    source = model_of(run.study, options)
    paths = {"model_dir": prepare_model(source, run.sharpen, WORK)}
    for key, limit in {"train": run.train_length, "test": run.test_length}.items():
        target = WORK / f"{key}-{run.study}.jsonl"
        paths[key] = prepare_pairs(getattr(options, key), source, limit, target)
    return {key: str(path) for key, path in paths.items()}


def carry_out(run: Run, options: argparse.Namespace, shared: dict[str, Any]) -> str | None:
    """Run in a process, and keep its record; what went wrong, if anything did."""
    spec = WORK / f"{run.study}-{run.name}.json".replace(" ", "-")
    spec.write_text(json.dumps(shared | prepare(run, options) | {"run": dataclasses.asdict(run)}))
    begin = time.monotonic()
    try:
        record = answer_of("bench.studies.worker", str(spec))
    except WorkerError as error:
        print(f"{run.study}: {run.name}: failed", flush=True)
        return error.log
    append(options.out, record)
    minutes = (time.monotonic() - begin) / 60
    print(f"{run.study}: {run.name}: {minutes:.1f} min", flush=True)
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out = options.out.resolve()
    if not options.report:
        commit: Commit = find_commit()
        if refused(options.out, commit, options.allow_dirty):
            return 2
        runs = list(planned(options))
        there = {study: read(options.out, study) for study in STUDIES}
        left = [run for run in runs if not is_done(run, there[run.study])]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are in {options.out} already")
        if left and (problems := carry_out_all(left, options, commit)):
            print(problems[0], file=sys.stderr)
            return 1
    for path in write_report(options.out):
        print(f"Written: {path}")
    return 0


def carry_out_all(runs: list[Run], options: argparse.Namespace, commit: Commit) -> list[str]:
    """Several at a time; the messages of those that failed."""
    shared = {"threads": options.threads, "commit": dataclasses.asdict(commit)}
    for run in runs:  # here, not by two runs at once
        prepare(run, options)
    with ThreadPoolExecutor(options.jobs) as pool:
        problems = pool.map(lambda run: carry_out(run, options, shared), runs)
    return [problem for problem in problems if problem]
