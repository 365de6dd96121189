"""The table of tokens, a pair a row, and the trees that its pairs form.

May import what the rows of data import. `columns` names the columns and fills them, `rows` gives
them to batches; `trees` says which pairs share a prompt, which of their answers are the same, and
what batches of them cost.
"""

from .columns import FILLER_ID as FILLER_ID
from .columns import PARTS as PARTS
from .columns import REFERENCE_COLUMNS as REFERENCE_COLUMNS
from .columns import THEIR_REFERENCE_COLUMNS as THEIR_REFERENCE_COLUMNS
from .columns import TOKEN_COLUMNS as TOKEN_COLUMNS
from .columns import UNSCORED_COLUMNS as UNSCORED_COLUMNS
from .columns import check_kind as check_kind
from .columns import check_reference as check_reference
from .columns import check_scores as check_scores
from .columns import features as features
from .columns import is_single as is_single
from .columns import is_tokenized as is_tokenized
from .columns import other_side as other_side
from .columns import reference_columns as reference_columns
from .columns import reference_of as reference_of
from .columns import token_columns as token_columns
from .columns import with_reference as with_reference
from .rows import PairRows as PairRows
from .trees import PairLengths as PairLengths
from .trees import TreeLengths as TreeLengths
from .trees import Trees as Trees
