"""Which cells the head's Triton backward computes, in plain torch.

The definition that `triton_routing.choose` is tested against, and that `active` measures without a
GPU. Shapes: N tokens, B vocabulary blocks, T tiles of tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from widemargin.kernels.linear_logprob.cells import ENOUGH, TILE
from widemargin.kernels.linear_logprob.routing import Routed, split_masses, thresholds
from widemargin.kernels.linear_logprob.types import GradRequest, Saved


def choose_cells(saved: Saved, request: GradRequest) -> tuple[Routed, Tensor, Tensor]:
    """What is computed, per pair (`Routed`, tokens in their own order), order [N], flags [B, T].

    With ``tail_eps`` 0 (``tail="exact"``) every cell is.
    """
    blocks, tokens = saved.partial_lse.shape
    tiles = -(-tokens // TILE)
    if request.tail_eps == 0:
        order = torch.arange(tokens, device=saved.lse.device)
        flags = torch.ones(blocks, tiles, dtype=torch.bool, device=saved.lse.device)
        everything = torch.ones_like(saved.partial_lse, dtype=torch.bool)
        nothing = torch.zeros_like(saved.partial_lse)
        return Routed(everything, nothing, ~everything), order, flags
    bounds = thresholds(request.grad, request.scored, request.tail_eps)
    masses, tops = split_masses(saved, bounds)
    active, alone = masses >= bounds, masses >= ENOUGH * bounds
    order = torch.argsort(active.sum(0), descending=True, stable=True)
    missing = tiles * TILE - tokens

    def tiled(pairs: Tensor) -> Tensor:
        return pad(pairs[:, order], (0, missing)).view(blocks, tiles, TILE)

    sizes = (tokens - TILE * torch.arange(tiles, device=order.device)).clamp_(max=TILE)
    enough = (sizes * ENOUGH // TILE).clamp_(min=1)
    flags = (tiled(active).sum(2) >= enough) | tiled(alone).any(2)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    computed = flags[:, place // TILE]
    routed = Routed(computed, masses.masked_fill_(computed, 0.0), tops & ~computed)
    return routed, order, flags
