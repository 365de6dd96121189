"""Whether the installed TRL has the place where `widemargin.integrations.trl` puts the head.

TRL's trainers call one ``autograd.Function``, by a global of ``trl.trainer.utils``, positionally.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..errors import UserError
from .findings import OK, WARN, Finding, Findings

TESTED = "1.16"
ADVICE = f"install TRL {TESTED} (pip install 'trl>={TESTED}'; Python 3.11 or newer)"
GLOBAL = "_ChunkedLogProbFunction"
CALLER = "add_fused_lm_head"
"""What calls it, for all trainers. Before, each trainer held the function itself, so that another
one in the module's global would have changed nothing, and nobody would have noticed."""
COMPACT = "_use_triton"
"""Its global that says whether labelled positions alone are scored."""
ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
)  # fmt: skip
"""Of the function's forward."""


def seam() -> Any:
    """The module ``trl.trainer.utils``, whose global can be replaced.

    Raises:
        UserError: TRL is not installed, or calls another function, or by another way.
    """
    if find_spec("trl") is None:
        raise UserError(f"trl: {ADVICE}; there is none")
    utils = importlib.import_module("trl.trainer.utils")
    function = getattr(utils, GLOBAL, None)
    function = getattr(function, "replaces", function)
    arguments = () if function is None else tuple(inspect.signature(function.forward).parameters)
    if arguments != ARGUMENTS or not all(hasattr(utils, name) for name in (CALLER, COMPACT)):
        raise UserError(f"trl: {ADVICE}; {_version()} calls its own head in another way")
    return utils


def trl() -> Findings:
    """Whether `use_widemargin_head` fits."""
    if find_spec("trl") is None:
        yield Finding(OK, "trl", f"not installed; use_widemargin_head alone needs it: {ADVICE}")
        return
    try:
        seam()
    except UserError as error:
        yield Finding(WARN, "trl", f"use_widemargin_head does not fit: {error}")
    else:
        yield Finding(OK, "trl", f"{_version()}, which use_widemargin_head fits")


def _version() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return "this TRL"
