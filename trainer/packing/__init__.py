"""How pairs lie in the rows of a batch, and the attention that keeps them apart.

May import settings and data. Start in `collator`: `PairCollator` makes a batch of rows in one of
three layouts, and `inputs` names its parts: `model_inputs` picks the arguments of the model's
forward. `layout` computes the places of the tokens, and `images` adds what prompts show. Inside the
forward `masks` builds attention masks, or `varlen` hands the lengths to attention that takes them,
as `recurrent` does for recurrent layers. `choose` lists the layouts for a model, the fastest first,
and `verify` compares them with padded batches. `split` tells which rows several ranks can share.
"""

from .collator import PairCollator
from .inputs import FROZEN, MISMATCHED, PAIR_INPUTS, inputs_after, model_inputs

__all__ = [
    "FROZEN",
    "MISMATCHED",
    "PAIR_INPUTS",
    "PairCollator",
    "inputs_after",
    "model_inputs",
]
