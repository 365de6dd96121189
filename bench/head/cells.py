"""Which cells the head's Triton backward computes, in plain torch.

The definition that `triton_routing.choose` is tested against, and that `active` measures without a
GPU. Shapes: N tokens, B vocabulary blocks, T tiles of tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from widemargin.kernels.linear_logprob.cells import ENOUGH, TILE
from widemargin.kernels.linear_logprob.routing import Routed, active_pairs, block_masses


def choose_cells(
    partial_lse: Tensor,
    lse: Tensor,
    logps: Tensor,
    targets: Tensor,
    grad: Tensor,
    scored: Tensor,
    tail_eps: float,
) -> tuple[Routed, Tensor, Tensor]:
    """What is computed, per pair (`Routed`, tokens in their own order), order [N], flags [B, T].

    With ``tail_eps`` 0 (``tail="exact"``) every cell is.
    """
    blocks, tokens = partial_lse.shape
    tiles = -(-tokens // TILE)
    if tail_eps == 0:
        order = torch.arange(tokens, device=lse.device)
        flags = torch.ones(blocks, tiles, dtype=torch.bool, device=lse.device)
        everything = torch.ones_like(partial_lse, dtype=torch.bool)
        return Routed(everything, torch.zeros_like(partial_lse)), order, flags
    masses = block_masses(partial_lse, lse, logps, targets)
    active = active_pairs(masses, grad, scored, tail_eps)
    alone = active_pairs(masses, grad, scored, ENOUGH * tail_eps)
    order = torch.argsort(active.sum(0), descending=True, stable=True)
    missing = tiles * TILE - tokens

    def tiled(pairs: Tensor) -> Tensor:
        return pad(pairs[:, order], (0, missing)).view(blocks, tiles, TILE)

    sizes = (tokens - TILE * torch.arange(tiles, device=order.device)).clamp_(max=TILE)
    enough = (sizes * ENOUGH // TILE).clamp_(min=1)
    flags = (tiled(active).sum(2) >= enough) | tiled(alone).any(2)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    computed = flags[:, place // TILE]
    return Routed(computed, masses.masked_fill_(computed, 0.0)), order, flags
