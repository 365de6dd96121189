"""The head: per-token log-probs from hidden states without logits, forward and backward.

May import `..reference` and `..checks`; knows nothing of the trainer. Start in `function`.
"""

from .function import HeadStats, linear_logprob
from .inputs import TAIL_EPS, Backend, Tail

__all__ = ["TAIL_EPS", "Backend", "HeadStats", "Tail", "linear_logprob"]
