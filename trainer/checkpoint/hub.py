"""The hub: refusals in one line, and the push of a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import refusals

if TYPE_CHECKING:
    from transformers import Trainer


def push(trainer: Trainer) -> None:
    """Upload ``output_dir``, card and report and all, as ``push_to_hub`` asks; on every rank.

    Raises:
        UserError: the hub cannot be reached or refuses; all files are there still.
    """
    folder = trainer.args.output_dir
    again = f"hf upload {trainer.hub_model_id or 'OWNER/NAME'} {folder} --exclude 'checkpoint-*'"
    with hub_refusals(f"push_to_hub: {folder} is complete but was not pushed; {again}"):
        trainer.push_to_hub()


@contextmanager
def hub_refusals(what: str) -> Iterator[None]:
    """What goes wrong with the hub inside becomes a ``UserError`` that begins with ``what``."""
    from huggingface_hub.errors import HfHubHTTPError

    # A connection refused is of the client library's own kind, which differs by the hub's version.
    kinds: Any = HfHubHTTPError.__bases__
    with refusals(what, OSError, ValueError, RuntimeError, *kinds):
        yield
