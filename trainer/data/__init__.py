"""Preference data: sources, rendering, tokenization and collation."""

from .collate import PairCollator, model_inputs
from .mixing import is_tokenized
from .pairs import PairData, load_pairs, tokenize_pairs
from .preflight import preflight_lines
from .report import DataReport, SplitReport
from .settings import DataSettings

__all__ = [
    "DataReport",
    "DataSettings",
    "PairCollator",
    "PairData",
    "SplitReport",
    "is_tokenized",
    "load_pairs",
    "model_inputs",
    "preflight_lines",
    "tokenize_pairs",
]
