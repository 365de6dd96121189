"""Print the hardest sentences of pages and docstrings: `python -m docs.prose` (`make prose`).

It is no gate: a person reads the list and mends it. A sentence's grade is textstat's automated
readability index: the years of school that a reader needs, by letters a word and words a sentence
(those by syllables want a dictionary from the network). Code, tables, quotations and sentences
below five words are left out, and a name in backticks counts as one short word.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("migration.md", "results.md", "families.md", "settings.md")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- table:.*?<!-- /table -->", re.DOTALL)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a Markdown text or a docstring."""
    text = TABLE.sub("", FENCE.sub("", text))
    lines = [line.strip() for line in text.splitlines()]
    lines = ["" if "   " in line else line for line in lines]  # columns of a docstring's table
    lines = [
        "" if line.startswith(("|", "#", ">", "!", "::", "<", "=")) else line for line in lines
    ]
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. |\w+: )", "\n".join(lines)):
        plain = re.sub(r"^([-*]|\d+\.) ", "", paragraph.strip())
        plain = re.sub(r"\]\([^)]*\)", "]", plain.replace("\n", " "))
        plain = re.sub(r"``[^`]+``|`[^`]+`", "name", re.sub(r"[*\[\]]", "", plain))
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain):
            if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 5 and sentence[-1] in ".!?":
                yield " ".join(sentence.split())


def texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """(where, text) of pages and of docstrings."""
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            yield name, source
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield f"{name}:{getattr(node, 'name', 'module')}", text


def default_paths() -> list[Path]:
    pages = [p for p in sorted(ROOT.glob("docs/*.md")) if p.name not in GENERATED]
    code = [p for top in ("kernels", "trainer") for p in sorted((ROOT / top).rglob("*.py"))]
    return [ROOT / "README.md", *pages, *code]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.prose", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: README, docs, docstrings")
    parser.add_argument("--count", type=int, default=20, help="sentences to print (default 20)")
    options = parser.parse_args(arguments)
    grade = importlib.import_module("textstat").automated_readability_index
    paths = [path.resolve() for path in options.paths] or default_paths()
    graded = [
        (grade(sentence), where, sentence)
        for where, text in texts(paths)
        for sentence in sentences(text)
    ]
    if not graded:
        print("no sentences")
        return 0
    for value, where, sentence in sorted(graded, reverse=True)[: options.count]:
        print(f"{value:5.1f}  {where}\n       {sentence}")
    mean = sum(value for value, _, _ in graded) / len(graded)
    print(f"\n{len(graded)} sentences, mean grade {mean:.2f}")
    for kind, ending in (("pages", ".md"), ("docstrings", ".py")):
        values = [value for value, where, _ in graded if ending in where]
        if values:
            print(f"  {kind}: {len(values)} sentences, mean grade {sum(values) / len(values):.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
