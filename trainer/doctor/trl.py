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

GLOBAL = "_ChunkedLogProbFunction"
_COMMON = ["weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
SIGNATURES = {
    "1.16": ["ctx", "hidden", *_COMMON, "logit_scale", "outputs"],
    "1.14": ["ctx", "last_hidden", *_COMMON, "logit_scale"],
}
"""Arguments of the function's forward in the versions that were tested."""


def seam() -> Any:
    """The module ``trl.trainer.utils``, whose global can be replaced.

    Raises:
        UserError: TRL is not installed, or its function is not one of `SIGNATURES`.
    """
    tested = " or ".join(SIGNATURES)
    if find_spec("trl") is None:
        raise UserError(f"trl: install TRL {tested} (pip install 'trl>=1.16'); it is not installed")
    utils = importlib.import_module("trl.trainer.utils")
    function = getattr(utils, GLOBAL, None)
    replaced = getattr(function, "replaces", function)
    arguments = [] if replaced is None else list(inspect.signature(replaced.forward).parameters)
    if arguments not in SIGNATURES.values():
        how = f"takes {', '.join(arguments[1:])}" if arguments else "is not there"
        raise UserError(
            f"trl: install TRL {tested}, with which the head was tested; in {_version()} "
            f"trl.trainer.utils.{GLOBAL} {how}"
        )
    return utils


def trl() -> Findings:
    """Whether `use_widemargin_head` fits."""
    try:
        seam()
    except UserError as error:
        status = OK if find_spec("trl") is None else WARN
        yield Finding(status, "trl", f"use_widemargin_head does not fit: {error}")
    else:
        yield Finding(OK, "trl", f"{_version()}, which use_widemargin_head fits")


def _version() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return "this TRL"
