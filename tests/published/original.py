"""Functions of a published file, without its imports."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def functions(
    path: Path, names: Sequence[str], known: dict[str, Any], constants: Sequence[str] = ()
) -> dict[str, Callable[..., Any]]:
    """The functions and methods ``names`` of a Python file, those that it has, able to run.

    ``known`` is what their bodies may name besides builtins, ``constants`` of the file, and each
    other.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            kept.append(node)
        if isinstance(node, ast.Assign):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            kept += [node] if targets & set(constants) else []
    annotated = ast.parse("from __future__ import annotations").body
    place = dict(known)
    exec(compile(ast.Module(annotated + kept, []), str(path), "exec"), place)
    return {name: place[name] for name in names if name in place}
