"""The pages, what they quote, and what the sources say."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser
from transformers.trainer_pt_utils import AcceleratorConfig
from widemargin.trainer.cli import _parser
from widemargin.trainer.evaluation.settings import AnswerSettings, HarnessSettings, PairSettings
from widemargin.trainer.objectives import OBJECTIVES, hyperparameters_of
from widemargin.trainer.sampling.generate import SampleSettings
from widemargin.trainer.sampling.scorers import ScoreSettings
from widemargin.trainer.settings.config import PreferenceConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
GENERATED = ("migration.md", "results.md", "settings.md")
"""Pages made by a program, and full of other projects' keys."""
MAKERS = {"results.md": "bench/report/pages.py", "studies.md": "bench/studies/report.py"}
"""What writes pages that are not there before the first results are."""
WRITTEN = [page for page in PAGES if page.name not in GENERATED]

OTHERS = {
    "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT", "ACCELERATE_USE_DEEPSPEED", "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "CUDA_LAUNCH_BLOCKING",
    "HF_DATASETS_CACHE", "OMP_NUM_THREADS", "sync_each_batch", "entropy_coef", "compute_metrics",
}  # fmt: skip
"""Names of other programs that pages mention and the sources do not."""

PLACEHOLDERS = {"--key", "--name", "--signal", "--dependency", "--rm", "--env", "--export"}
"""Options that stand for any, and Slurm's."""
NOT_THERE = {"kernels/__init__.py"}
"""Files that pages say must not be there."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"^ *> `(.+)`$", re.MULTILINE)
_FORMAT = re.compile(r"%[-+0-9.,]*[sdrfg]")
GAP = "…"


def fenced(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks outside of fenced blocks and quoted messages."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`([^`\n]+)`", _QUOTED.sub("", text))


def shell_lines(page: Path) -> list[str]:
    """Lines of fenced blocks that are not YAML or Python, those that go on in the next joined."""
    blocks = (text for language, text in fenced(page) if language in ("", "bash"))
    return [line for text in blocks for line in text.replace("\\\n", " ").splitlines()]


def quoted_messages(page: Path) -> list[str]:
    """Messages of this project: quotations that are nothing but code."""
    return _QUOTED.findall(page.read_text(encoding="utf-8"))


@cache
def source_texts() -> str:
    """Every text in the package's sources, one a line, with a gap where a value is put in."""
    texts = []
    for folder in ("trainer", "kernels", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                    texts.append(" ".join(_FORMAT.sub(GAP, _text(node)).split()))
    return "\n".join(sorted(set(texts)))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return GAP


def is_printed(message: str) -> bool:
    """Whether a source text has the message's parts, one after another."""
    parts = [part.strip() for part in message.split(GAP)]
    return any(_has_in_order(text, parts) for text in source_texts().splitlines())


def _has_in_order(text: str, parts: list[str]) -> bool:
    end = 0
    for part in parts:
        begin = text.find(part, end)
        if begin < 0:
            return False
        end = begin + len(part)
    return True


@cache
def settings() -> frozenset[str]:
    """Names of all settings: of training, the objectives, evaluation."""
    kinds: tuple[Any, ...] = (
        PreferenceConfig,
        PairSettings,
        AnswerSettings,
        HarnessSettings,
        SampleSettings,
        ScoreSettings,
    )
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    names |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # by any transformers
    names |= {"every_n_layers", "offload"}  # of the latter
    names |= {field.name for field in dataclasses.fields(AcceleratorConfig)}
    return frozenset(names.union(*(hyperparameters_of(name) for name in OBJECTIVES)))


@cache
def engine_keys() -> frozenset[str]:
    """Keys of the shipped launchers' files, nested ones too."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            found.update(map(str, value))
            for inner in value.values():
                collect(inner)

    for path in (ROOT / "configs" / "accelerate").iterdir():
        collect(yaml.safe_load(path.read_text(encoding="utf-8")))
    return frozenset(found)


@cache
def flags() -> frozenset[str]:
    """Options of `widemargin` and all its commands, and of `accelerate launch`."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    collect(inner)

    collect(_parser())
    collect(launch_command_parser())
    return frozenset(found)


@cache
def sources() -> str:
    """All that the project's own files say, pages left out."""
    folders = ("trainer", "kernels", "integrations", "configs", "bench", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    wanted = {".py", ".yaml", ".json", ".sh"}
    here = Path(__file__)
    found = [path for path in paths if path.suffix in wanted and path != here]
    texts = [path.read_text(encoding="utf-8") for path in found if "results" not in path.parts]
    return "\n".join([*texts, (ROOT / "Makefile").read_text(encoding="utf-8")])
