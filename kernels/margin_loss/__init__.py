"""From token log-probs to the loss of length-normalised margins, forward and backward.

May import `..reference` and `..checks`; knows nothing of the trainer. Start in `function`.
"""

from .function import Kind, margin_loss, pair_losses, sequence_logps

__all__ = ["Kind", "margin_loss", "pair_losses", "sequence_logps"]
