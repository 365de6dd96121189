"""From a YAML file and overrides, ``--key=value`` or ``--key value``, to a `PreferenceConfig`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, expect
from .checks import check_metric
from .coercion import LONGEST_NUMBER, as_number, coerced_values, hints_of, takes_text
from .config import PreferenceConfig, objective_keys
from .published.keys import TABLE
from .published.loss_type import check_loss_type
from .published.scripts import (
    as_published_class,
    as_published_script,
    departures,
    is_published,
    kept_defaults,
)
from .published.translation import SCRIPTS, fit_objective, merge, name_objective, translate
from .published.unknown import check_names, unknown_key

_MOST_NESTED, _MOST_VALUES = 50, 100_000
_QUOTED_OR_NULL = re.compile(r"""\s*(null|~|'.*'|".*")\s*""", re.DOTALL)

NULLS = {"max_grad_norm": 0.0}
"""What null means where that is not the default: transformers 4 clipped nothing."""


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    script: str | None = None,
) -> PreferenceConfig:
    """The settings in the YAML file ``path``, with ``--key=value`` overrides applied.

    What became of settings under published names is printed, by the main process.

    Args:
        path: of the file.
        overrides: they win over the file, under whichever name.
        script: the published script whose twin was launched, a key of `SCRIPTS`.

    Raises:
        UserError: no such file, no mapping, an unknown key (the nearest is named) or a value of
            the wrong type.
    """
    settings = merge(read_yaml(Path(path)), parse_overrides(overrides))
    notes: list[str] = []
    config = build_config(settings, script=script, notes=notes)
    if config.process_index == 0:
        _print("Settings under published names", notes)
        if script is not None:
            _print(f"Where this run departs from scripts/{script}.py", departures(config))
        elif is_published(settings):
            _print(
                "Kept from here, not from the published scripts", kept_defaults(config, settings)
            )
    return config


def _print(title: str, lines: list[str]) -> None:
    if lines:
        print(title, *lines, sep="\n  ", flush=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read without running anything in it.

    ``configs/train/NAME.yaml`` and the like are those of this package where the folder has none.
    """
    if path.parts[:1] == ("configs",) and not path.exists():
        shipped = Path(str(files("widemargin.configs"))).joinpath(*path.parts[1:])
        path = shipped if shipped.is_file() else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"config {path}: {reason}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not a text file; give a YAML file in UTF-8") from error
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"config {path}: expected settings as `key: value` lines")
    return settings


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of a size that settings have.

    Raises:
        ValueError: what is wrong and where, without what the text says there: it may be a secret.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        problem = re.sub(r"'[^']{2,}'", "…", error.problem or "it cannot be read")
        if r"'\t'" in (error.problem or ""):
            problem = "write spaces in place of the tab"
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(problem + where) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError:
        raise ValueError("it has characters that YAML does not allow") from None
    except Exception as error:  # of a constructor: a day such as 2024-02-30, !!bool "abc"
        raise ValueError(f"a value is not of its kind ({type(error).__name__})") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML readers silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:  # others' cannot be hashed
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _check_size(root: yaml.Node) -> None:
    """Raise for a text that aliases would make huge, that nests deeply, or for a huge number."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        def refuse(problem: str) -> None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

        if id(node) in sizes:
            return sizes[id(node)]
        if depth > _MOST_NESTED:
            refuse("it is nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
                refuse("a number is too long")
            return 1
        parts: list[Any] = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        if sizes[id(node)] > _MOST_VALUES:
            refuse("its aliases stand for too many values; write them out")
        return sizes[id(node)]

    size(root, 0)


def joined(arguments: Iterable[str]) -> list[str]:
    """The arguments with ``--key value`` as ``--key=value``; no value starts with ``--``."""
    result: list[str] = []
    for argument in arguments:
        if result and re.fullmatch(r"--[\w.-]+", result[-1]) and not argument.startswith("--"):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result


def parse_overrides(arguments: Iterable[str], kind: type[Any] = PreferenceConfig) -> dict[str, Any]:
    """``--key=value`` and ``--key value``: text where a setting of ``kind`` is text, else YAML."""
    settings, hints = {}, hints_of(kind)
    for argument in joined(arguments):
        key, equals, value = argument.removeprefix("--").partition("=")
        shown = re.match(r"[-\u2010-\u2015\u2212]*\w*", argument)  # what follows may be a secret
        name = shown[0] if shown else ""
        if not argument.startswith("--") or not equals or not re.fullmatch(r"[\w.-]+", key):
            more = "" if name == argument else "…"
            hint = "such as --beta=2.5, and a list in brackets, --key=[a,b]"
            raise UserError(f"argument {name}{more}: expected --key=value, {hint}")
        if not value.strip():  # a variable of the shell that is not set
            raise UserError(f"argument {name}=: give a value, or --{key}=null for the default")
        key_here = key.replace("-", "_")
        try:
            if takes_text(key_here, hints.get(key_here)) and not _QUOTED_OR_NULL.fullmatch(value):
                settings[key_here] = value  # a number, a date, or with #, : and newlines in it
            else:
                settings[key_here] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"argument --{key}: the value is not valid YAML: {error}") from None
    return settings


def build_config(
    settings: dict[str, Any], *, script: str | None = None, notes: list[str] | None = None
) -> PreferenceConfig:
    """`PreferenceConfig` from plain settings, published names and the objective's included.

    A line for each setting that had another name goes to ``notes``; ``script`` as in `load_config`.
    """
    fields = hints_of(PreferenceConfig)
    try:
        settings = _under_our_names(settings, script, [] if notes is None else notes)
    except UserError:  # in another library's file the names come first
        if settings.get("objective") is None:
            check_names(settings, [*fields, *TABLE])
        raise
    arguments = _pop_hyperparameters(settings)
    settings |= {k: null for k, null in NULLS.items() if k in settings and settings[k] is None}
    values = coerced_values(settings, PreferenceConfig)
    config = PreferenceConfig(**values, objective_args=arguments)
    check_metric(config.metric_for_best_model)
    return config


def _under_our_names(
    settings: dict[str, Any], script: str | None, notes: list[str]
) -> dict[str, Any]:
    """The settings with published keys translated, and ``objective`` among them."""
    check_loss_type(settings, script)
    if script is not None:
        settings = as_published_script(settings, notes)
    settings = translate(settings, notes)
    settings = name_objective(settings, SCRIPTS.get(script) if script else None, notes)
    settings = fit_objective(settings, notes)
    return settings if script is None else as_published_class(settings, script, notes)


def _pop_hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Take ``objective_args``, and the objective's keys among the others, from settings.

    Raises:
        UserError: one is given in both places, or a key belongs neither here nor to the objective.
    """
    hyperparameters = objective_keys(str(settings["objective"]))
    arguments = settings.pop("objective_args", None) or {}
    expect("objective_args", arguments, isinstance(arguments, dict), "a mapping")
    arguments = {name: as_number(value) for name, value in arguments.items()}
    fields, unknown = hints_of(PreferenceConfig), []
    for key in list(settings):
        if key in hyperparameters and key in arguments:
            raise UserError(f"{key}: given beside objective_args and in it; keep one")
        if key in hyperparameters:
            value = as_number(settings.pop(key))
            arguments |= {} if value is None else {key: value}
        elif key not in fields:
            known = [*fields, *hyperparameters, *TABLE]
            unknown.append(unknown_key(key, settings["objective"], known))
    if unknown:
        raise UserError("; ".join(unknown))
    return arguments
