"""From token log-probs to the loss of length-normalised margins, forward and backward.

May import `..reference` and `..checks`; knows nothing of the trainer. Start in `function`.
"""

from .function import margin_loss, pair_losses, sequence_logps
from .types import Kind

__all__ = ["Kind", "margin_loss", "pair_losses", "sequence_logps"]
