"""Benchmark the head: hidden states to per-token log-probabilities and back.

`python -m bench.head` from the repository root measures every provider on this CPU in under two
minutes and prints a table; `--case`, `--providers` and `--device` choose others. Exit status 1: one
of our own heads failed its gate.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench.head.harness import Settings, measure
from bench.head.providers import PROVIDERS
from bench.head.table import table
from bench.lib.cases import CASES, Case
from bench.lib.record import add_output_options, destination, writer
from bench.lib.states import StatesCase, states_cases


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__)
    parser.add_argument("--case", nargs="+", help="default: those of --states, cpu, or llama3-8b")
    parser.add_argument(
        "--states", type=Path, help="states that bench.head.active wrote, as two more cases"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, help="timed rounds (default 3, or 10 on cuda)")
    parser.add_argument(
        "--budget-s", type=float, default=30, help="begin no further round after this (default 30)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    add_output_options(parser, "head_<device>.json")
    parser.add_argument("--list", action="store_true", help="list cases and providers, and stop")
    options = parser.parse_args(arguments)
    options.cases = CASES | (states_cases(options.states) if options.states else {})
    unknown = [name for name in options.case or () if name not in options.cases]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; known: {', '.join(options.cases)}")
    return options


def default_cases(options: argparse.Namespace) -> list[str]:
    if options.states:
        return [name for name, case in options.cases.items() if isinstance(case, StatesCase)]
    return ["llama3-8b" if options.device == "cuda" else "cpu"]


def show_choices(device: str, cases: dict[str, Case] = CASES) -> None:
    for case in cases.values():
        shape = f"{case.tokens} x {case.hidden_size} x {case.vocab}"
        print(f"case      {case.name:28} {shape:22} {case.dtype} {case.distribution}")
    some = CASES["tiny"]
    for provider in PROVIDERS.values():
        print(f"provider  {provider.name:28} {provider.unavailable(some, device) or 'available'}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        show_choices(options.device, options.cases)
        return 0
    cuda = options.device == "cuda"
    out, commit = destination(options, f"head_{options.device}.json")
    if options.threads:
        torch.set_num_threads(options.threads)
    repeats = options.repeats or (10 if cuda else 3)
    memory = "none" if options.no_memory else "fresh"
    settings = Settings(options.device, repeats, 2 * cuda, options.budget_s, memory)
    providers = [PROVIDERS[name] for name in options.providers or PROVIDERS]
    rows: list[dict[str, Any]] = []
    write = writer(out)
    for name in options.case or default_cases(options):
        rows += measure(options.cases[name], providers, settings, commit)
        # After every case, so that a run that is cut short loses only the one it was at.
        write(rows)
    print(table(rows))
    bad = {
        row["provider"]: row["reason"]
        for row in rows
        if row["provider"].startswith("widemargin") and row["gate"] in ("wrong", "failed to run")
    }
    for name, reason in bad.items():
        print(f"error: {name} was not timed: {reason}", file=sys.stderr)
    return 1 if bad else 0
