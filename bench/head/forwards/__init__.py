"""Other ways to the head's logits in its forward, which no chip uses yet: benchmarks compare them.

`tma` and `library` each have a ``launch`` for `triton_forward.forward_by` and its ``TILE``; `head`
makes a differentiable head of one. One that a GPU prefers moves to `kernels/linear_logprob/`.
"""
