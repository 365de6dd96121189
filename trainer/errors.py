"""Errors that speak to the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: one line that names the thing, what was expected, what came and what to do.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


@contextmanager
def refusals(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """What a library raises of these kinds inside becomes a ``UserError`` about ``what``."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:400]}") from error
