"""Names of a data set's columns, raw and tokenized."""

from __future__ import annotations

from typing import Any

FILLER_ID = -1
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
THEIR_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # in TRL

RAW_COLUMNS = ("prompt", "chosen", "rejected")


def is_tokenized(dataset: Any) -> bool:
    """Whether a data set holds token ids already, by its columns."""
    return set(TOKEN_COLUMNS) <= set(getattr(dataset, "column_names", None) or ())
