"""The standard peaked case: a head's inputs that look like an instruction-tuned model's.

Token frequencies are Zipf-like over the ids, hidden states point along the frequency direction and,
as far as `sharpness` says, at their own target; `sharpness` is solved so that the mean entropy is
1.5 nats. Random inputs (*flat*, sharpness 0) flatter any head that skips work; a *shuffled*
vocabulary is the worst case for one that skips it in blocks.

Shapes: N tokens, H hidden, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["peaked", "flat", "shuffled"]

CHUNK_BYTES = 128 * 2**20
SOLVE_TOKENS = 64


@dataclass(frozen=True)
class PeakedCase:
    """Inputs of a head and what is known about them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] int64
    coefficients: Tensor  # [N] fp32: the gradient of a SimPO loss in each logp
    entropy: float  # mean over tokens, nats
    sharpness: float


def peaked_case(
    tokens: int,
    hidden_size: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    distribution: Distribution = "peaked",
    entropy: float = 1.5,
    seed: int = 0,
) -> PeakedCase:
    """Build the case on `device`; numbers depend on seed, sizes and kind of device.

    Peak memory is the weight in fp32, the result, and some chunks of logits.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    log_frequency = -(torch.arange(vocab, device=device) + 20.0).log()
    direction = torch.nn.functional.normalize(normal(hidden_size), dim=0)
    mean = 0.5 * normal(hidden_size)
    weight = normal(vocab, hidden_size).add_(mean).div_(math.sqrt(hidden_size))
    targets = torch.multinomial(
        log_frequency.softmax(0), tokens, replacement=True, generator=generator
    )
    pull = weight[targets] - weight.mean(0)
    weight.addr_(log_frequency, direction, alpha=0.25)
    base = 2 * normal(tokens, hidden_size) + 4 * direction
    pull *= torch.rand(tokens, 1, generator=generator, device=device) + 0.5
    if distribution == "shuffled":
        order = torch.randperm(vocab, generator=generator, device=device)
        weight, targets = weight[order], order.argsort()[targets]
    weight = weight.to(dtype)

    sharpness, reached = 0.0, math.nan
    if distribution != "flat":
        sharpness, reached = _solve_sharpness(base, pull, weight, entropy)
    hidden = base.add_(pull, alpha=sharpness).to(dtype)
    if distribution == "flat":
        reached = mean_entropy(hidden, weight)
    coefficients = simpo_coefficients(tokens, seed=seed).to(device)
    return PeakedCase(hidden, weight, targets, coefficients, reached, sharpness)


def mean_entropy(hidden: Tensor, weight: Tensor) -> float:
    """Mean entropy in nats of softmax(hidden @ weight.T), a chunk of tokens at a time."""
    chunk = max(1, CHUNK_BYTES // (4 * len(weight)))
    sums = [_entropies(fp32_logits(part, weight)).sum() for part in hidden.split(chunk)]
    return float(torch.stack(sums).sum()) / len(hidden)


def simpo_coefficients(tokens: int, *, beta: float = 2.5, seed: int = 0) -> Tensor:
    """Gradients [N] of a mean SimPO loss in the token logps: pairs of about 2 x 200 tokens.

    Chosen tokens want a higher logp (negative gradient), rejected tokens a lower one; all tokens of
    one sequence share theirs, as the loss is over mean logps.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    sequences = 2 * max(1, tokens // 400)
    lengths = torch.rand(sequences, generator=generator) + 0.5
    bounds = (lengths.cumsum(0) / lengths.sum() * tokens).round().long()
    counts = bounds.diff(prepend=bounds.new_zeros(1))
    gaps = torch.randn(sequences // 2, generator=generator)
    pull = beta * torch.sigmoid(-gaps) / (sequences // 2)
    signed = torch.cat([-pull, pull]) / counts.clamp_min(1)
    return signed.repeat_interleave(counts)


def _solve_sharpness(
    base: Tensor, pull: Tensor, weight: Tensor, target: float
) -> tuple[float, float]:
    """Sharpness and the mean entropy it gives, over all tokens, in the dtype of `weight`.

    Bisection on a few tokens, whose logits are linear in the sharpness, aimed again with the
    difference that all tokens show.
    """
    some = min(SOLVE_TOKENS, len(base))
    base_logits, pull_logits = fp32_logits(base[:some], weight), fp32_logits(pull[:some], weight)
    aim, sharpness, reached = target, 0.0, math.inf
    for _ in range(4):
        sharpness = _bisect(base_logits, pull_logits, aim)
        reached = mean_entropy(torch.add(base, pull, alpha=sharpness).to(weight.dtype), weight)
        if abs(reached - target) <= 0.05:
            break
        aim += target - reached
    if not abs(reached - target) <= 0.2:
        raise ValueError(
            f"peaked case of {len(base)} tokens, {tuple(weight.shape)} weight: mean entropy "
            f"{reached:.2f} reached, {target} wanted; take a larger hidden size or vocabulary"
        )
    return sharpness, reached


def _bisect(base_logits: Tensor, pull_logits: Tensor, aim: float) -> float:
    """The sharpness with which the mean entropy of these tokens is `aim`; entropy falls with it."""
    low, middle, high = 0.0, 0.0, 1024.0
    for _ in range(30):
        middle = (low + high) / 2 if low else high / 4
        logits = torch.add(base_logits, pull_logits, alpha=middle)
        entropy = float(_entropies(logits).mean())
        if abs(entropy - aim) < 0.01:
            break
        low, high = (middle, high) if entropy > aim else (low, middle)
    return middle


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T [n, V] in fp32; on a CPU, half-precision weights are widened in pieces."""
    if hidden.is_cuda and weight.dtype != torch.float32:
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    pieces = [hidden.float() @ piece.float().T for piece in weight.split(rows)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def fp32_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """logps [N] as torch makes them from logits that are fp32, a chunk of tokens at a time."""
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    pieces = []
    for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        logps = fp32_logits(part, weight).log_softmax(-1)
        pieces.append(logps.gather(1, ids[:, None])[:, 0])
    return torch.cat(pieces)


def _entropies(logits: Tensor) -> Tensor:
    """[n] nats; overwrites nothing."""
    lse = logits.logsumexp(-1)
    return lse - torch.linalg.vecdot((logits - lse[:, None]).exp_(), logits)
