"""Preference data: sources, rendering, tokenization and collation."""

from ..packing.collator import PairCollator, model_inputs
from ..settings.data import DataSettings
from .columns import is_tokenized
from .first_pair import preflight_lines
from .pairs import PairData, load_pairs, tokenize_pairs
from .report import DataReport, SplitReport

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
