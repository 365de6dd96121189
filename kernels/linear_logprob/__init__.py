"""The head: per-token log-probs from hidden states without logits, forward and backward.

May import `..reference` and `..checks`; knows nothing of the trainer. Start in `function`.

`function` (mathematics, checks) → `operators` (autograd) → `torch_forward`, `torch_backward` or
`triton_forward`, `triton_backward`. `types` says what the backends take and return, `routing` which
pairs a backward computes; `cells` lists them for the GPU.
"""

from ..checks import Backend
from .function import linear_logprob
from .types import TAIL_EPS, TRAINING_TAIL_EPS, HeadStats, Tail

__all__ = ["TAIL_EPS", "TRAINING_TAIL_EPS", "Backend", "HeadStats", "Tail", "linear_logprob"]
