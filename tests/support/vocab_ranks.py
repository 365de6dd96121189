"""Both ranks of a head whose vocabulary is split, each against one process.

    torchrun --nproc_per_node=2 -m tests.support.vocab_ranks FOLDER

Every rank writes ``FOLDER/RANK.json``: errors by case, messages of refused calls, and what else
must hold.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import linear_logprob
from widemargin.kernels.vocab_parallel import vocab_parallel_linear_logprob

from tests.support.head_cases import VARIANTS, gradients, make, relative, split, tail_gradients

EVEN, RAGGED, CUT = (512, 512), (512, 333), (501, 500)
"""Rows of each rank: blocks of 128 that are those of one process, then a last one that is not full,
then blocks that are cut elsewhere than in one process."""
BACKENDS = ("torch", "triton") if "TRITON_INTERPRET" in os.environ else ("torch",)
"""Those that take a CPU's tensors: Triton in its interpreter, which tests use where no GPU is."""
PARTS = 2**-3
"""A ``tail_eps`` with which some pairs are computed and some are averaged."""


def shard(x: Tensor | None, rows: tuple[int, ...]) -> Any:
    """This rank's rows of ``x``, a leaf."""
    if x is None:
        return None
    return x.detach().split(rows)[dist.get_rank()].clone().requires_grad_()


def padded(weight: Tensor, bias: Tensor | None, targets: Tensor, rows: tuple[int, ...]) -> Any:
    """The head of one process whose blocks are those of the ranks.

    Rows that no token can have fill each rank's last block. Also where the others are.
    """
    places = [torch.arange(n) for n in rows]
    for before, place in enumerate(places[1:]):
        place += int(places[before][-1]) // 128 * 128 + 128
    where = torch.cat(places)
    wide = weight.new_zeros(int(where[-1]) + 1, weight.shape[1])
    offset = weight.new_full((len(wide),), -torch.inf)
    wide[where] = weight.detach()
    offset[where] = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    inside = targets.where(targets < 0, where[targets.clamp_min(0)])
    return wide.requires_grad_(), offset.requires_grad_(), inside, where


def errors(
    rows: tuple[int, ...], tail: Any, variant: dict, *, tokens: int = 40, backend: Any = "torch"
) -> dict[str, float]:
    """Relative ones of log-probs, dH, dW and db; two ranks in fp32 against one process."""
    has_bias, options = split(variant)
    options |= {"tail": tail, "tail_eps": PARTS, "backend": backend}
    hidden, weight, targets, bias, grad = make(
        tokens, 12, sum(rows), torch.float32, bias=has_bias, sharp=0.7
    )
    targets[::7] = -100
    if rows[0] % 128 and "softcap" not in variant:
        wide, offset, inside, where = padded(weight, bias, targets, rows)
        logps, one = gradients(linear_logprob, hidden, wide, inside, offset, grad, **options)
        one = [one[0], one[1][where], one[2][where]]
    else:
        logps, one = gradients(linear_logprob, hidden, weight, targets, bias, grad, **options)
    mine = shard(weight, rows), targets, shard(bias, rows)
    found, two = gradients(
        vocab_parallel_linear_logprob, hidden, *mine, grad, group=None, **options
    )
    one = [one[0], *(x.split(rows)[dist.get_rank()] for x in one[1:])]
    result = {"logps": relative(found, logps)}
    named = zip(("dH", "dW", "db"), two, one, strict=False)  # with a bias or without
    return result | {name: relative(g, e) for name, g, e in named}


def equal_cases() -> dict[str, dict[str, float]]:
    found = {}
    for parameters in VARIANTS:
        (variant,) = parameters.values
        for rows in (EVEN, RAGGED, CUT):
            for tail in ("exact", "mean", "drop"):
                if tail == "exact" or rows is not CUT or "softcap" not in variant:
                    found[f"{parameters.id} {rows} {tail}"] = errors(rows, tail, variant)
    return found


def triton_cases() -> dict[str, dict[str, float]]:
    """Interpreted, so few tokens and rows."""
    found = {}
    every = {"softcap": 2.0, "logit_scale": 1.7, "bias": True}
    cases = ((every, "mean"), (every, "exact"), ({}, "drop"))
    for variant, tail in cases:
        rows = (100, 99) if tail == "exact" else (128, 60)
        found[f"triton {variant} {rows} {tail}"] = errors(
            rows, tail, variant, tokens=9, backend="triton"
        )
    return found


def defined_cases() -> dict[str, float]:
    """Tails of blocks that one process has not, under a softcap: as they are defined, in fp64."""
    found = {}
    for tail in ("mean", "drop"):
        *inputs, grad = make(40, 12, sum(CUT), sharp=1.5, bias=True)
        options = {"softcap": 3.0, "logit_scale": 1.7}
        case = tail_gradients(*inputs, grad, tail, PARTS, shards=CUT, **options)
        assert 0.02 < case.active < 0.9
        hidden, weight, targets, bias = inputs
        mine = shard(weight, CUT), targets, shard(bias, CUT)
        settings = options | {"group": None, "tail": tail, "tail_eps": PARTS}
        _, two = gradients(vocab_parallel_linear_logprob, hidden, *mine, grad, **settings)
        one = [case.gradients[0]]
        one += [x.split(CUT)[dist.get_rank()] for x in case.gradients[1:]]
        found[tail] = max(relative(g, e) for g, e in zip(two, one, strict=True))
    return found


def small(**changes: Any) -> Any:
    """hidden, this rank's rows, targets, no bias and a gradient, in fp32."""
    hidden, weight, targets, _, grad = make(20, 8, 300, torch.float32, sharp=2.0, **changes)
    return hidden, shard(weight, (170, 130)), targets, None, grad


def bad_token(backend: str) -> bool:
    """A token that is not finite leaves the others as they were, on all ranks."""
    clean = small()
    hidden = clean[0].detach().clone()
    hidden[3, 0] = torch.nan
    spoilt = (hidden.requires_grad_(), *clean[1:])
    others = torch.arange(20) != 3
    settings: Any = {"group": None, "tail_eps": PARTS, "backend": backend}
    logps, (d_hidden, _) = gradients(vocab_parallel_linear_logprob, *spoilt, **settings)
    expected, (wanted, _) = gradients(vocab_parallel_linear_logprob, *clean, **settings)
    kept = torch.equal(logps[others], expected[others])
    return (
        kept
        and bool(logps[3].isnan())
        and bool(d_hidden[others].isfinite().all())
        and (
            relative(d_hidden[others], wanted[others]) < 0.05  # the profile is of fewer tokens
        )
    )


def frozen(kept: str) -> bool:
    """Only what is trained has a gradient, the one that it has with the others."""
    hidden, weight, targets, _, grad = small()
    _, full = gradients(
        vocab_parallel_linear_logprob, hidden, weight, targets, None, grad, group=None
    )
    leaves = [hidden.detach().requires_grad_("h" in kept), weight.detach()]
    leaves[1].requires_grad_("w" in kept)
    logps = vocab_parallel_linear_logprob(leaves[0], leaves[1], targets, group=None)
    logps.backward(grad.float())
    pairs = zip("hw", leaves, full, strict=True)
    return all(
        torch.equal(leaf.grad, g) if name in kept else leaf.grad is None for name, leaf, g in pairs
    )


def no_tokens(tail: Any) -> bool:
    hidden, weight, targets, _, grad = small()
    none = (hidden[:0].detach().requires_grad_(), weight, targets[:0], None, grad[:0])
    logps, found = gradients(vocab_parallel_linear_logprob, *none, group=None, tail=tail)
    return logps.shape == (0,) and found[0].shape == (0, 8) and not found[1].any()


def nobody_scored() -> bool:
    hidden, weight, targets, _, grad = small()
    inputs = (hidden, weight, targets.fill_(-100), None, grad)
    logps, found = gradients(vocab_parallel_linear_logprob, *inputs, group=None)
    return not logps.any() and not any(g.any() for g in found)


def without_gradients() -> bool:
    hidden, weight, targets, _, _ = small()
    with torch.no_grad():
        logps = vocab_parallel_linear_logprob(hidden, weight, targets, group=None, vocab_start=None)
    start = 170 * dist.get_rank()
    known = vocab_parallel_linear_logprob(hidden, weight, targets, group=None, vocab_start=start)
    return torch.equal(logps, known)


def checkpointed() -> bool:
    hidden, weight, targets, _, grad = small()

    def run(hidden, weight, targets, bias, **options):
        return checkpoint(
            lambda h, w: vocab_parallel_linear_logprob(h, w, targets, **options),
            hidden,
            weight,
            use_reentrant=False,
        )

    inputs = (hidden, weight, targets, None, grad)
    _, plain = gradients(vocab_parallel_linear_logprob, *inputs, group=None)
    _, again = gradients(run, *inputs, group=None)
    return all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def in_half() -> bool:
    """Under autocast, as `linear_logprob` on one process."""
    hidden, weight, targets, bias, grad = make(40, 12, 1024, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps, one = gradients(linear_logprob, hidden, weight, targets, bias, grad, tail="exact")
        mine = (hidden, shard(weight, EVEN), targets, bias, grad)
        found, two = gradients(vocab_parallel_linear_logprob, *mine, group=None, tail="exact")
    whole = (logps, one[0], one[1].split(EVEN)[dist.get_rank()])
    return all(relative(g, e) < 1e-4 for g, e in zip((found, *two), whole, strict=True))


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refused() -> dict[str, str]:
    hidden, weight, targets, _, _ = small()
    rank = dist.get_rank()

    def call(targets: Tensor = targets, group: Any = None, **options: Any) -> Tensor:
        return vocab_parallel_linear_logprob(hidden, weight, targets, group=group, **options)

    beyond = targets.clone()
    beyond[4] = 300
    logps = call().sum()
    first = dist.new_group([0])
    return {
        "outside": message(lambda: call(beyond)),
        "overlap": message(lambda: call(vocab_start=160 * rank)),
        "gap": message(lambda: call(vocab_start=180 * rank)),
        "start": message(lambda: call(vocab_start=-1)),
        "others": message(lambda: call((targets + rank) % 300)),
        "group": message(lambda: call(group=first)),
        "twice": message(lambda: second_derivative(hidden, logps)),
    }


def second_derivative(hidden: Tensor, loss: Tensor) -> None:
    (found,) = torch.autograd.grad(loss, hidden, create_graph=True)
    found.sum().backward()


def reference_error() -> float:
    """Against the plain definition, in fp64."""
    hidden, weight, targets, bias, grad = make(30, 12, sum(CUT), bias=True)
    options = {"softcap": 3.0, "temperature": 0.7}
    logps, one = gradients(reference.linear_logprob, hidden, weight, targets, bias, grad, **options)
    mine = (hidden, shard(weight, CUT), targets, shard(bias, CUT), grad)
    found, two = gradients(
        vocab_parallel_linear_logprob, *mine, group=None, tail="exact", **options
    )
    whole = (logps, one[0], *(x.split(CUT)[dist.get_rank()] for x in one[1:]))
    return max(relative(g, e) for g, e in zip((found, *two), whole, strict=True))


def extras_error(variant: dict[str, Any]) -> float:
    """Of what is returned on request, and of gradients with the entropy's, in fp64."""
    hidden, weight, targets, bias, grad = make(30, 12, sum(CUT), bias=True)
    targets[::5] = -100
    names = ("entropy", "log_sum_sq_probs", "mean_logits")
    options = {f"return_{name}": True for name in names} | {"tail": "exact", **variant}

    def gradients_of(op: Any, *inputs: Any, **more: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias = inputs
        logps, entropy, *others = op(hidden, weight, targets, bias=bias, **options, **more)
        loss = (logps * grad).sum() + (entropy * grad.flip(0)).sum()
        return logps, entropy, *others, *torch.autograd.grad(loss, inputs)

    one = gradients_of(linear_logprob, hidden, weight, bias)
    mine = (hidden, shard(weight, CUT), shard(bias, CUT))
    two = gradients_of(vocab_parallel_linear_logprob, *mine, group=None)
    one = (*one[:-2], *(x.split(CUT)[dist.get_rank()] for x in one[-2:]))
    return max(relative(g, e) for g, e in zip(two, one, strict=True))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    holds = {f"bad token {name}": bad_token(name) for name in BACKENDS}
    holds |= {f"trained {kept}": frozen(kept) for kept in ("h", "w", "hw")}
    holds |= {f"no tokens {tail}": no_tokens(tail) for tail in ("exact", "mean", "drop")}
    for check in (nobody_scored, without_gradients, checkpointed, in_half):
        holds[check.__name__] = check()
    found = {
        "equal": equal_cases() | (triton_cases() if "triton" in BACKENDS else {}),
        "defined": defined_cases(),
        "exact": [reference_error(), *(extras_error(v) for v in ({}, {"softcap": 3.0}))],
        "holds": holds,
        "refused": refused(),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
