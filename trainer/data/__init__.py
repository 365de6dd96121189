"""Preference data: from the names of data sets to a table of tokens.

May import settings. Start in `pairs`, whose `load_pairs` calls the rest. A row passes through, in
this order: `sources` (names -> raw rows; `formats` has the forms that these come in), `rows` (a raw
row -> a pair of texts or messages), `chat` (a pair -> text, through the chat template; `separate`
has the published scripts' way), `guard` (text that the template left out), `images` (the tokens of
images that prompts show), `encoding` (text -> token ids, by `encoder`; `turns` says which are
scored), `limits` (ids -> those that fit), `table` (ids -> the columns that batches read). `report`
counts the rows.
"""

from ..settings.data import DataSettings
from .pairs import PairData, load_pairs, tokenize_pairs
from .report import DataReport, SplitReport

__all__ = [
    "DataReport",
    "DataSettings",
    "PairData",
    "SplitReport",
    "load_pairs",
    "tokenize_pairs",
]
