"""What `linear_logprob` takes beyond its inputs and results, and what full logits would take.

Shapes: N tokens, H hidden, V vocabulary, B = ceil(V / 128) blocks. The design's bound is
``2·N·B·4 + N·H·4`` bytes and a workspace of at most 256 MiB; ``partial_lse`` [B, N] is the first
N·B of it and a result of forward, so it is not counted here.
"""

from __future__ import annotations

from ...kernels.linear_logprob.routing import BLOCK, num_blocks

WORKSPACE = 256 * 2**20
CHUNK = 1024, 2048
"""Tokens and vocabulary rows of one product of the torch head."""
FP32 = 4


def forward_extra(tokens: int, hidden: int, vocab: int, compute_bytes: int, backend: str) -> int:
    """Bytes inside forward: column sums of each token tile (Triton), a chunk of logits (torch)."""
    if backend == "triton":
        return -(-tokens // BLOCK) * vocab * FP32
    chunk = min(tokens, CHUNK[0]) * min(vocab, CHUNK[1])
    return (chunk + tokens * num_blocks(vocab)) * FP32 + _operands(tokens, hidden, compute_bytes)


def backward_extra(tokens: int, hidden: int, vocab: int, compute_bytes: int, backend: str) -> int:
    """Bytes inside backward: masses [B, N], dH in fp32, and the workspace."""
    masses, blocks = tokens * num_blocks(vocab) * FP32, num_blocks(vocab)
    d_hidden = tokens * hidden * FP32
    if backend == "triton":
        cells = (blocks + 1) * -(-tokens // BLOCK) + 1
        work = tokens * hidden * compute_bytes + cells * BLOCK * BLOCK * compute_bytes
        return masses + d_hidden + min(work, WORKSPACE)
    rows = min(tokens, CHUNK[0])
    buffers = CHUNK[0] * (CHUNK[1] + 2 * hidden) + rows + 2 * blocks * hidden
    in_place = compute_bytes == FP32  # dH is then what is returned
    rest = 0 if in_place else d_hidden + _operands(tokens, hidden, compute_bytes)
    return 2 * masses + masses // 4 + buffers * FP32 + rest


def _operands(tokens: int, hidden: int, compute_bytes: int) -> int:
    """The torch head's inputs widened to fp32 on a CPU: a chunk of W and the hidden states."""
    return 0 if compute_bytes == FP32 else (tokens * hidden + CHUNK[1] * hidden) * FP32


def bound(tokens: int, hidden: int, vocab: int) -> int:
    """The design's bound on all of it, ``partial_lse`` included."""
    return 2 * tokens * num_blocks(vocab) * FP32 + tokens * hidden * FP32 + WORKSPACE


def full_logits(positions: int, vocab: int) -> int:
    """fp32 logits of all positions, their log-softmax, and its gradient: what is not there."""
    return 3 * positions * vocab * FP32
