"""The head's Triton kernels against the reference: interpreted on a CPU, native with CUDA."""

from __future__ import annotations

import weakref

import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import cells, triton_backward
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.tiles import FULL, Tiles
from widemargin.kernels.linear_logprob.types import GradRequest

from bench.lib.exact import exact
from bench.lib.peaked import fp32_logits, peaked_case
from tests.support.head_cases import VARIANTS, gradients, make, relative, split
from tests.support.triton_inputs import DEVICE, inputs_of, saved_forward

SHAPES = [
    pytest.param(1, 16, 300, id="one token"),
    pytest.param(7, 33, 1009, id="prime sizes"),
    pytest.param(5, 16, 77, id="vocabulary below a block"),
    pytest.param(129, 24, 128, id="exactly one block, one token past a tile"),
    pytest.param(300, 40, 650, id="three tiles"),
]


def in_fp64(inputs):
    wide = [x if x is None or x.dtype == torch.int64 else x.detach().double() for x in inputs]
    return [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in wide]


@pytest.mark.costly
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
def test_exact_within_twice_torchs_error(n, h, v, variant):
    bias, options = split(variant)
    *inputs, grad = inputs_of(n, h, v, bias=bias)
    inputs[2][1::3] = -100
    expected, expected_grads = gradients(
        reference.linear_logprob, *in_fp64(inputs), grad, **options
    )
    logps, grads = gradients(
        linear_logprob, *inputs, grad, backend="triton", tail="exact", **options
    )
    assert (logps - expected).abs().max() < 2e-5
    _, torch_grads = gradients(reference.linear_logprob, *inputs, grad, **options)
    for got, expected_grad, peer in zip(grads, expected_grads, torch_grads, strict=True):
        assert relative(got, expected_grad) <= 2 * relative(peer, expected_grad) + 2e-6


DESCRIBED = Tiles(FULL.forward, *(tile._replace(descriptors=True) for tile in FULL[1:]))


@pytest.mark.costly
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
@pytest.mark.parametrize("tail_eps", [0.0, 2**-6])
def test_backward_by_descriptors(n, h, v, tail_eps, monkeypatch):
    """As by pointers, which step in where a row of the operands is not of whole 16 bytes."""
    options = {"logit_scale": 0.5, "softcap": 5.0}
    hidden, weight, targets, bias, grad = inputs_of(n, h, v, bias=True, sharp=1.5)
    call, saved = saved_forward(hidden.detach(), weight.detach(), targets, bias, **options)
    request = GradRequest(grad.float(), targets >= 0, tail_eps, True, True, True)
    expected, _ = triton_backward.backward(call, saved, request)
    made = []
    real = triton_backward.descriptors
    monkeypatch.setattr(
        triton_backward, "descriptors", lambda *args: made.append(real(*args)) or made[-1]
    )
    found, _ = triton_backward.backward(call, saved, request, DESCRIBED)
    assert {None not in pair for pair in made} == {h % 4 == 0}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


MANY_TOPS = [
    pytest.param({"softcap": 30.0, "bias": True}, id="weak softcap"),
    pytest.param({"logit_scale": -1.0}, id="turned"),
]


def spied_routing(monkeypatch) -> list[cells.Routing]:
    """The routings of the backward passes to come."""
    chosen: list[cells.Routing] = []
    choose = triton_backward.choose
    monkeypatch.setattr(
        triton_backward,
        "choose",
        lambda *args, **kwargs: chosen.append(choose(*args, **kwargs)) or chosen[-1],
    )
    return chosen


def listed(entries: cells.Entries, order: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    """The entries [N, 128 B] bool, in the tokens' order, that each of the two lists has."""
    found = torch.zeros(2, len(order), 128 * blocks, dtype=torch.bool)
    for place, token in enumerate(order.tolist()):
        first, last = entries.token_bounds[place : place + 2].tolist()
        found[0, token, entries.rows[first:last].long()] = True
    for block in range(blocks):
        first, last = entries.block_bounds[block : block + 2].tolist()
        places = entries.places[first:last].long().cpu()
        found[1, order.cpu()[places // 128], 128 * block + places % 128] = True
    assert int(entries.block_bounds[-1]) == int(entries.token_bounds[-1]) == int(found[0].sum())
    return [x.to(order.device) for x in found]


@pytest.mark.costly
@pytest.mark.parametrize(
    ("tail", "entries", "variant"),
    [
        pytest.param(tail, entries, *variant.values, id=f"{tail}-{entries}-{variant.id}")
        for tail, entries in (("mean", 128), ("drop", 128), ("mean", 2), ("mean", 0))
        for variant in (*VARIANTS, *MANY_TOPS)
        # With all tops listed each variant; where some are not, those that touch what is listed.
        if (tail, entries) == ("mean", 128) or variant.id in ("all", "weak softcap", "turned")
    ],
)
def test_tails_by_definition(tail, entries, variant, monkeypatch):
    """Cells and entries as routing says; all other mass spread by the profile, or dropped.

    With memory for fewer entries the bound of tops rises until they fit, or there are none.
    """
    bias, options = split(variant)
    *inputs, grad = inputs_of(300, 16, 1100, bias=bias, sharp=2.0)
    chosen = spied_routing(monkeypatch)
    monkeypatch.setattr(cells, "ENTRIES", entries)
    tail_eps = {128: 2**-5, 2: 2**-4, 0: 2**-3}[entries]  # so that some cells stay apart
    settings = {"backend": "triton", "tail": tail, "tail_eps": tail_eps}
    _, grads = gradients(linear_logprob, *inputs, grad, **settings, **options)
    order, flags, _, lists, _ = chosen[0]
    active = flags[:, order.argsort() // cells.TILE]
    assert 0.01 < active.double().mean() < 0.99
    by_token, by_block = listed(lists, order, len(flags))
    assert torch.equal(by_token, by_block)
    hidden, weight, targets, offset = in_fp64(inputs)
    assert targets is not None
    with torch.no_grad():
        scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
        z = reference.head_logits(hidden, weight, offset, scale, cap)
        slope = 1 - (z / cap) ** 2 if cap else torch.ones_like(z)
        p = z.softmax(-1)
        rows = torch.arange(300, device=DEVICE)
        tops = by_token[:, :1100].clone()
        assert tops[rows, targets].all()
        tops[rows, targets] = False
        each = tops.sum() / 300
        assert each <= entries
        if entries == 128 and options.get("softcap", 30.0) == 30.0 and "logit_scale" not in options:
            assert each > 0.1
        d_logits = torch.zeros_like(z)
        for b in range(9):
            block = slice(128 * b, min(128 * b + 128, 1100))
            mass = p[:, block].sum(-1)
            profile = (p[:, block] / mass[:, None] * slope[:, block]).mean(0)
            held = targets // 128 == b
            rest = torch.where(held, mass - p[rows, targets], mass)
            rest -= (p[:, block] * tops[:, block]).sum(-1)
            active_grad = -p[:, block] * slope[:, block]
            spread = -rest[:, None] * profile if tail == "mean" else torch.zeros_like(active_grad)
            spread = torch.where(tops[:, block], spread + active_grad, spread)
            here = held & active[b]
            active_grad[here, targets[here] - 128 * b] = 0
            d_logits[:, block] = torch.where(active[b][:, None], active_grad, spread)
        d_logits[rows, targets] += (1 - p[rows, targets]) * slope[rows, targets]
        d_logits *= grad[:, None] * scale
        expected = [d_logits @ weight, d_logits.T @ hidden, d_logits.sum(0)]
    for got, expected_grad in zip(grads, expected, strict=False):
        assert relative(got, expected_grad) < 2e-5


@pytest.mark.costly
def test_a_workspace_of_a_few_cells_changes_nothing(monkeypatch):
    *inputs, grad = inputs_of(300, 16, 1100, bias=True, sharp=2.0)
    settings = {"backend": "triton", "tail_eps": 2**-4}
    _, uncut = gradients(linear_logprob, *inputs, grad, **settings)
    monkeypatch.setattr(triton_backward, "WORKSPACE_BYTES", 5 * 128 * 128 * 4)
    _, cut = gradients(linear_logprob, *inputs, grad, **settings)
    for a, b in zip(cut, uncut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_many_tokens_take_few_launches():
    """Of 32,768 tokens at the size of Llama-3-8B, three launches a slice."""
    tokens, blocks = 32768, 1002
    hidden = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
    capacity = triton_backward._cells_that_fit(hidden, blocks, tokens // 128)
    assert cells.slice_count(blocks, tokens // 128, capacity) < 40
    assert capacity * 128 * 128 * 2 + 8 * blocks * 4096 <= triton_backward.WORKSPACE_BYTES


def test_the_sorted_tokens_make_room_for_the_result(monkeypatch):
    sort_tokens, finish_hidden = triton_backward.sort_tokens, triton_backward.finish_hidden
    made, left = [], []

    def sort(*args):
        tokens = sort_tokens(*args)
        made.append(weakref.ref(tokens.hidden))
        return tokens

    def finish(*args):
        left.extend(ref() for ref in made)
        return finish_hidden(*args)

    monkeypatch.setattr(triton_backward, "sort_tokens", sort)
    monkeypatch.setattr(triton_backward, "finish_hidden", finish)
    *inputs, grad = inputs_of(20, 16, 300)
    gradients(linear_logprob, *inputs, grad, backend="triton")
    assert len(made) == 1
    assert left == [None]


@pytest.mark.costly
def test_same_bits_every_time():
    *inputs, grad = inputs_of(150, 16, 700, sharp=2.0)
    first = gradients(linear_logprob, *inputs, grad, backend="triton")[1]
    again = gradients(linear_logprob, *inputs, grad, backend="triton")[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.costly
@pytest.mark.parametrize("tail", ["exact", "mean", "drop"])
def test_no_tokens_and_frozen_sides(tail):
    *inputs, grad = inputs_of(0, 8, 300, bias=True)
    logps, grads = gradients(linear_logprob, *inputs, grad, backend="triton", tail=tail)
    assert logps.shape == (0,)
    assert all((g == 0).all() for g in grads)
    hidden, weight, targets, bias, grad = inputs_of(20, 8, 400, bias=True)
    full = gradients(
        linear_logprob, hidden, weight, targets, bias, grad, backend="triton", tail=tail
    )[1]
    for kept in ("h", "w", "b"):
        leaves = dict(zip("hwb", (x.detach() for x in (hidden, weight, bias)), strict=True))
        leaves[kept].requires_grad_()
        out = linear_logprob(
            leaves["h"], leaves["w"], targets, bias=leaves["b"], backend="triton", tail=tail
        )
        out.backward(grad.float())
        torch.testing.assert_close(leaves[kept].grad, full["hwb".index(kept)])


@pytest.mark.costly
def test_poisoned_memory_and_one_bad_token(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        fresh = new_empty(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    hidden, weight, targets, _, grad = inputs_of(140, 8, 600, sharp=2.0)
    for tail in ("exact", "mean", "drop"):
        settings = {"backend": "triton", "tail": tail}
        clean, clean_grads = gradients(
            linear_logprob, hidden, weight, targets, None, grad, **settings
        )
        assert all(torch.isfinite(g).all() for g in clean_grads)
        bad = hidden.detach().clone()
        bad[3, 0] = float("nan")
        bad.requires_grad_()
        logps, grads = gradients(linear_logprob, bad, weight, targets, None, grad, **settings)
        others = torch.arange(140, device=DEVICE) != 3
        assert not torch.isfinite(logps[3])
        torch.testing.assert_close(logps[others], clean[others])
        assert torch.isfinite(grads[0][others]).all()


def test_strided_inputs_and_stats():
    hidden, weight, targets, bias, grad = inputs_of(40, 24, 500, sharp=2.0, bias=True)
    wide = torch.zeros(40, 48, device=DEVICE)
    wide[:, ::2] = hidden.detach()
    strided = wide[:, ::2].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    apart = torch.stack((bias.detach(), bias.detach() + 9), 1)[:, 0].requires_grad_()
    expected = gradients(linear_logprob, hidden, weight, targets, bias, grad, tail="exact")
    got = gradients(
        linear_logprob, strided, turned, targets, apart, grad, tail="exact", backend="triton"
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    logps, stats = linear_logprob(hidden, weight, targets, backend="triton", return_stats=True)
    logps.sum().backward()
    assert 0 < stats.active_fraction <= 1


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiles_as_one_graph(mode):
    hidden, weight, targets, _, _ = inputs_of(12, 8, 300)

    def scored(hidden, weight):
        return (linear_logprob(hidden * 1.5, weight, targets, backend="triton") ** 2).sum()

    expected = torch.autograd.grad(scored(hidden, weight), (hidden, weight))
    compiled = torch.compile(scored, fullgraph=True, backend=mode)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected
    )


def test_explicit_triton_on_inputs_it_cannot_take():
    hidden, weight, targets, _, _ = make(3, 4, 50)
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(hidden, weight, targets, backend="triton")


@pytest.mark.costly
def test_a_bias_alone_allocates_no_weight_gradient(monkeypatch):
    hidden, weight, targets, bias, grad = inputs_of(150, 8, 900, bias=True, sharp=2.0)
    full = gradients(linear_logprob, hidden, weight, targets, bias, grad, backend="triton")[1]
    shapes = []
    new_empty = torch.Tensor.new_empty

    def spy(self, *args, **kwargs):
        fresh = new_empty(self, *args, **kwargs)
        shapes.append(fresh.shape)
        return fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", spy)
    alone = [hidden.detach(), weight.detach(), targets, bias, grad]
    (d_bias,) = gradients(linear_logprob, *alone, backend="triton")[1]
    torch.testing.assert_close(d_bias, full[2])
    assert weight.shape not in shapes


@pytest.mark.costly
def test_flat_distribution_computes_each_cell_once_and_says_dense():
    """Where every block matters to every token the mean tail does what "exact" does, no more."""
    hidden, weight, targets, _, grad = inputs_of(300, 16, 1100, sharp=0.01)
    grad = grad.sign()
    settings = {"backend": "triton", "return_stats": True}
    by_tail = {}
    for tail in ("exact", "mean"):
        logps, stats = linear_logprob(hidden, weight, targets, tail=tail, **settings)
        by_tail[tail] = torch.autograd.grad(logps, (hidden, weight), grad.float())
        assert stats.values.tolist() == [1.0, 0.0, 0.0, 1.0]
    torch.testing.assert_close(by_tail["mean"], by_tail["exact"], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("tail", ["exact", "mean"])
def test_real_precision_on_a_gpu(tail):
    """bf16 inputs against fp64: logps within twice fp32 logits' error, gradients as promised."""
    case = peaked_case(2048, 1024, 32000, dtype=torch.bfloat16, device="cuda")
    expected = exact(case)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight)]
    logps = linear_logprob(*leaves, case.targets, tail=tail, backend="triton")
    head_grads = torch.autograd.grad(logps, leaves, case.coefficients)
    with torch.no_grad():
        rows = fp32_logits(case.hidden, case.weight).log_softmax(-1)
    torch_logps = rows.gather(1, case.targets[:, None])[:, 0]
    assert relative(logps, expected.logp) <= 2 * relative(torch_logps, expected.logp)
    logits = (leaves[0] @ leaves[1].T).float().log_softmax(-1)
    peer = torch.autograd.grad(
        logits.gather(1, case.targets[:, None])[:, 0], leaves, case.coefficients
    )
    for mine, torchs, true, bound in zip(
        head_grads, peer, (expected.dhidden, expected.dweight), (1e-2, 5e-3), strict=True
    ):
        assert relative(mine, true) <= (bound if tail == "mean" else 2 * relative(torchs, true))


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", ["peaked", "flat"])
def test_memory_bound_on_a_gpu(distribution):
    tokens, width, vocabulary = 4096, 1024, 65536
    case = peaked_case(
        tokens, width, vocabulary, dtype=torch.bfloat16, device="cuda", distribution=distribution
    )
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight)]
    extra = 0
    for _ in range(2):  # the first run may load libraries with memory of their own
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        logps = linear_logprob(*leaves, case.targets, backend="triton")
        gradients_ = torch.autograd.grad(logps, leaves, case.coefficients)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients_)
        del logps, gradients_
    blocks = vocabulary // 128
    assert extra <= 2 * tokens * blocks * 4 + tokens * width * 4 + 256 * 2**20


@pytest.mark.gpu
def test_deterministic_on_a_gpu():
    *inputs, grad = inputs_of(3000, 64, 20000, sharp=0.5)
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the library's own settings
    try:
        first = gradients(linear_logprob, *inputs, grad, backend="triton")[1]
        again = gradients(linear_logprob, *inputs, grad, backend="triton")[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
