"""How pairs lie in the rows of a batch, and the attention that keeps them apart.

May import settings and data. Start in `collator`: `PairCollator` makes a batch of rows in one of
three layouts, and `model_inputs` picks the arguments of the model's forward; `layout` computes the
places of the tokens, and `images` adds what prompts show. Inside the forward `masks` builds
attention masks, or `varlen` hands the lengths to attention that takes them, as `recurrent` does for
recurrent layers. `choose` lists the layouts for a model, the fastest first, and `verify` compares
them with padded batches.
"""

from .collator import PAIR_INPUTS, PairCollator, mismatched_inputs, model_inputs

__all__ = ["PAIR_INPUTS", "PairCollator", "mismatched_inputs", "model_inputs"]
