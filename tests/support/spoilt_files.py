"""Files that nobody wrote on purpose: bytes flipped, values replaced, no file at all.

A case is a kind and a number, which seed all that is random in it. A kind makes its files, lets the
project read them, and is sound if that ends well or in a `UserError`, in bounded time and memory.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from widemargin.trainer import PreferenceConfig
from widemargin.trainer.checkpoint.files import choose_checkpoint, settle_leftovers
from widemargin.trainer.checkpoint.resume import last_run
from widemargin.trainer.data import load_pairs
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import chat_client, judging, questions
from widemargin.trainer.evaluation.results import Records
from widemargin.trainer.model.loading import (
    load_model,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)
from widemargin.trainer.objectives import OBJECTIVES, hyperparameters_of
from widemargin.trainer.report.write import summary_lines, write_report
from widemargin.trainer.settings.files import build_config, load_config

from tests.support.fuzzing import LEFT_OUT, quietly, run_case
from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs, tiny_trainer

WAIT_S, CPU_S = 120, 30
MEMORY_BYTES = 2**30
"""Bounds of a case: how long it may take, by the clock and of the processor, and need."""

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
EDGES: list[Any] = [
    0, -1, 1, 2, 0.5, 1.0, -0.0, 5e-324, 1e-8, 1e308, -1e308, 2**31, -(2**31), 2**53 + 1, 2**63,
    -(2**63), 10**400, float("inf"), float("-inf"), float("nan"), True, None, "", "0", "1e999",
    "nan", "0x10", "1_000", "١", [], {},
]  # fmt: skip
ODD: list[Any] = [
    *EDGES,
    "a" * 5000,
    "\ud800",
    "\x1b[2J\u202e",
    "../..",
    [[]],
    {"a": {}},
    [None] * 99,
]
TORN = (b"", b"\x00" * 64, b"\xff\xfe{}", b"null", b"[" * 100_000, b"[]", b"{}", b"9" * 5000)


class OutOfBounds(BaseException):
    """A case that takes too long or too much; no library's ``except Exception`` catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, a case that passes the bounds raises `OutOfBounds`."""

    def late(*_: Any) -> None:
        raise OutOfBounds(f"not done after {WAIT_S} s")

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
    before, began = _peak(), time.process_time()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(WAIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    used, seconds = _peak() - before, time.process_time() - began
    if used > MEMORY_BYTES or seconds > CPU_S:
        raise OutOfBounds(f"took {seconds:.1f} s and {used / 2**20:.0f} MiB")


def limit_memory() -> None:
    """Let this process fail where it would take the machine's memory."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY_BYTES, resource.RLIM_INFINITY))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def spoilt_value(random: Random, value: Any) -> Any:
    """A JSON value with one of its parts replaced, left out, renamed or doubled."""
    value = copy.deepcopy(value)
    part = value
    while isinstance(part, dict | list) and part:
        key: Any = random.choice(list(part) if isinstance(part, dict) else range(len(part)))
        inner = part[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.7:
            part = inner
            continue
        how = random.randrange(4)
        if how == 0:
            del part[key]
        elif how == 1 and isinstance(part, dict):
            part[random.choice(["", "a", "step", "\ud800", "x" * 999])] = part.pop(key)
        elif how == 2 and isinstance(part, list):
            part.append(inner)
        else:
            part[key] = random.choice(ODD)
        break
    return value


def spoilt_bytes(random: Random, content: bytes) -> bytes:
    """The content with bits flipped, cut, or with bytes put in."""
    if random.random() < 0.1 or not content:
        return random.choice(TORN)
    data, place = bytearray(content), random.randrange(len(content))
    length = random.choice([1, 1, 4, 100, len(content)])
    how = random.randrange(4)
    if how == 0:
        for _ in range(random.choice([1, 1, 8])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif how == 1:
        del data[place : place + length]
    elif how == 2:
        data[place:place] = random.choice([random.randbytes(4), b"\xff", b"\x00", b"{", b"1e999"])
    else:
        data[place:place] = data[place : place + length]
    return bytes(data)


def spoil(random: Random, path: Path) -> None:
    """Replace a file by a spoilt one: of text, of JSON, or of no file at all."""
    content = path.read_bytes()
    how = random.randrange(10)
    if how < 5 and path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        place = random.randrange(len(lines))
        lines[place] = json.dumps(spoilt_value(random, json.loads(lines[place])))
        content = "\n".join(lines).encode()
    elif how < 9:
        content = spoilt_bytes(random, content)
    path.unlink()
    if how < 9:
        path.write_bytes(content)
        return
    instead = random.choice(["nothing", "folder", "fifo", "loop"])
    if instead == "folder":
        path.mkdir()
    elif instead == "fifo":
        os.mkfifo(path)
    elif instead == "loop":
        path.symlink_to(path)


@contextmanager
def spoiling(random: Random, folder: Path, names: list[str]) -> Iterator[None]:
    """Inside, one or two of the folder's files are spoilt."""
    chosen = random.sample(names, random.choice([1, 1, 2]))
    before = {name: (folder / name).read_bytes() for name in chosen}
    for name in chosen:
        spoil(random, folder / name)
    try:
        yield
    finally:
        for name, content in before.items():
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.write_bytes(content)


@cache
def numeric_fields() -> dict[str, list[str]]:
    """Numbers among the settings, and each objective's."""
    hints = typing.get_type_hints(PreferenceConfig)
    names = [
        field.name
        for field in dataclasses.fields(PreferenceConfig)
        if field.init and field.name not in LEFT_OUT
        and {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}
    ]  # fmt: skip
    return {objective: [*names, *hyperparameters_of(objective)] for objective in OBJECTIVES}


def edges(random: Random, folder: Path) -> str:
    """Numbers at their edges, as far as a batch, and now and then through a step of training."""
    objective = random.choice(list(OBJECTIVES))
    names = random.sample(numeric_fields()[objective], random.choice([1, 1, 2]))
    settings = {name: random.choice(EDGES) for name in names}
    rows = [{"prompt": "Hello there.", "chosen": "yes, water", "rejected": "no"}] * 4
    outcome = run_case((rows, settings, "plain", objective), folder)
    if outcome != "ran" or random.random() > 0.05:
        return outcome
    small = {k: v for k, v in settings.items() if not isinstance(v, int) or abs(v) < 1000}
    config = build_config({"objective": objective, "output_dir": str(folder / "run"), **small})
    given = {name: getattr(config, name) for name in small if hasattr(config, name)}
    given |= {"objective": objective, "objective_args": config.objective_args, "max_steps": 1}
    trainer = tiny_trainer(folder / "run", **given)
    trainer.train()
    return "trained"


def yaml_files(random: Random, folder: Path) -> str:
    """Published settings with bytes, lines or structures changed."""
    text = random.choice(YAMLS).read_text()
    lines = text.splitlines()
    place = random.randrange(len(lines))
    structures = [
        "&a [*a]", "{a: {b: [1, {c: d}]}}", "[" * 60, "!!python/object:os.system {}", "!!set {a}",
        "2024-02-30", "'\\ud800'", '"\\uD800"', "? [a]\n: b", "<<: *x", "&x {a: 1}\n<<: *x",
        "|\n  a", "0o7", "1:30", ".inf", "-.nan", "~", "1" * 5000, "- - - a", "{? : }", "%YAML 9",
        "--- ---", "\t", "!!binary x", "!!float a", "!!timestamp 1-1-1", "'", '"', "@", "`",
    ]  # fmt: skip
    key = lines[place].partition(":")[0]
    how = random.randrange(4)
    if how == 0:
        lines[place] = f"{key}: {random.choice(structures)}"
    elif how == 1:
        lines.insert(place, random.choice([*structures, lines[random.randrange(len(lines))]]))
    elif how == 2:
        lines[place] = f"{key}: {random.choice(ODD)!r}"
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if how == 3:
        content = spoilt_bytes(random, text.encode())
    path = folder / "settings.yaml"
    path.write_bytes(content)
    load_config(path, ["--use_cpu=true", "--bf16=false", "--report_to=none", "--tf32=null"])
    return "ran"


def runs(random: Random, folder: Path) -> str:
    """A run's folder: its report, its checkpoints and its lock."""
    run = _run_folder(folder)
    checkpoints = ["checkpoint-1/manifest.json", "checkpoint-2/manifest.json"]
    names = ["run.json", "trainer_state.json", ".running", *checkpoints]
    with spoiling(random, run, names):
        places = [run] if random.random() < 0.7 else [run, folder / "other-run"]
        for act in (
            lambda: write_report(places, folder / "report.html"),
            lambda: summary_lines(places),
            lambda: settle_leftovers(run),
            lambda: choose_checkpoint(
                random.choice(["auto", True, str(run / "checkpoint-2")]), run, run=last_run(run)
            ),
        ):
            with suppress(UserError):
                act()
    return "ran"


@cache
def _run_folder(folder: Path) -> Path:
    run = folder / "run-of-before"
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer(run, **settings)
    trainer.train()
    trainer.save_state()
    (run / "run.json").write_text(json.dumps({"settings": {"seed": 0}, "objective": {"name": "x"}}))
    (run / ".running").write_text(json.dumps({"run": "a"}))
    shutil.copytree(run, folder / "other-run")
    return run


def models(random: Random, folder: Path) -> str:
    """A model's folder: config, tokenizer and weights."""
    place = _model_folder(folder)
    with spoiling(random, place, sorted(path.name for path in place.iterdir())):
        config = build_config(
            {"objective": "simpo", "model_name_or_path": str(place), "use_cpu": True}
        )
        load_model_config(config)
        load_tokenizer(config)
        vocabulary_size(load_model(config))
    return "ran"


@cache
def _model_folder(folder: Path) -> Path:
    place = folder / "model"
    tiny_model().save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return place


def data_files(random: Random, folder: Path) -> str:
    """A file of pairs, in every format that is read."""
    name = random.choice(["pairs.jsonl", "pairs.json", "pairs.parquet"])
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(_good_pairs(folder)[name])
    spoil(random, path)
    try:
        config = build_config({"objective": "simpo", "dataset": str(path), "use_cpu": True})
        load_pairs(config, TOKENIZER, len(TOKENIZER))
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None
        shutil.rmtree(folder / "cache", ignore_errors=True)
    return "ran"


@cache
def _good_pairs(folder: Path) -> dict[str, bytes]:
    pairs = tiny_pairs(4)
    pairs.to_json(folder / "good.jsonl")
    pairs.to_parquet(folder / "good.parquet")
    rows = (folder / "good.jsonl").read_text().splitlines()
    return {
        "pairs.jsonl": (folder / "good.jsonl").read_bytes(),
        "pairs.json": f"[{','.join(rows)}]".encode(),
        "pairs.parquet": (folder / "good.parquet").read_bytes(),
    }


def answers(random: Random, folder: Path) -> str:
    """What a judge answers, and the files of questions and of answers kept."""
    completion = {"choices": [{"message": {"content": "My final verdict: [[A>>B]]", "role": "x"}}]}
    body = json.dumps(spoilt_value(random, completion)).encode()
    body = body if random.random() < 0.5 else spoilt_bytes(random, body)
    client = chat_client.ChatClient("m", "http://localhost/v1", attempts=1)
    client._post = lambda messages, more: body  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(UserError):
        client.ask([], lambda said: judging.parse_verdict(chat_client.text_of(said)))
    good: dict[str, tuple[Callable[[str], Any], Any]] = {
        "alpaca.json": (questions.alpaca_questions, [{"instruction": "a", "dataset": "b"}]),
        "outputs.json": (questions.alpaca_outputs, [{"instruction": "a", "output": "b"}]),
        "arena.jsonl": (questions.arena_questions, {"uid": "u", "category": "c", "prompt": "p"}),
    }
    name, (read, content) = random.choice(list(good.items()))
    path = folder / name
    path.write_text(json.dumps(content))
    spoil(random, path)
    try:
        with suppress(UserError):
            read(str(path))
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    records = folder / "answers.jsonl"
    records.unlink(missing_ok=True)
    with Records(folder, "answers", {}) as kept:
        kept.append([{"id": "a", "output": "x"}, {"id": "b", "output": "y"}])
    records.write_bytes(spoilt_bytes(random, records.read_bytes()))
    with Records(folder, "answers", {}) as kept:
        assert kept.done.items() <= {
            "a": {"id": "a", "output": "x"}, "b": {"id": "b", "output": "y"},
        }.items()  # fmt: skip
    return "ran"


KINDS: dict[str, Callable[[Random, Path], str]] = {
    "edges": edges, "yaml": yaml_files, "runs": runs, "models": models, "data": data_files,
    "answers": answers,
}  # fmt: skip
"""What is spoilt, and how the project reads it."""


def try_case(kind: str, number: int, folder: Path) -> str:
    """What became of a case: "refused", or where its kind came to.

    Raises:
        OutOfBounds: it took too long, or too much memory.
        Exception: whatever is not a ``UserError``.
    """
    with bounded():
        try:
            return KINDS[kind](Random(f"{kind}-{number}"), folder)
        except UserError:
            return "refused"


def search(kind: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """Try ``count`` cases of a kind; how many came to each end.

    Raises:
        AssertionError: names the first case that ends otherwise, and comes from its error.
    """
    limit_memory()
    outcomes: Counter[str] = Counter()
    with quietly(), redirect_stdout(io.StringIO()):
        for number in range(seed * 10**6, seed * 10**6 + count):
            try:
                outcomes[try_case(kind, number, folder)] += 1
            except Exception as error:
                raise AssertionError(f"try_case({kind!r}, {number}, folder)") from error
    return outcomes
