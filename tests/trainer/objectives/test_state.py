"""What objectives carry between calls, processes and checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES, build_objective

from tests.support.objective_cases import MIXTURE, OF_PAIRS
from tests.support.preference_batches import Pair, called, pack, random_pairs

TRAINED = [*OF_PAIRS, MIXTURE]
STATEFUL = [name for name in TRAINED if build_objective(name).state_dict()]
COUPLED: dict[str, dict[str, Any]] = {
    **{name: {} for name, spec in OBJECTIVES.items() if spec.couples_pairs},
    "sft": {"nll": "tokens"},
    "simpo": {"nll": "tokens", "sft_weight": 0.5},
    MIXTURE: {"nll": "tokens"},
}


def through_torch(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save(state))


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("transport", [through_torch, through_safetensors])
@pytest.mark.parametrize("name", TRAINED)
def test_resumed_equals_uninterrupted(name, transport):
    batches = [called(random_pairs(np.random.default_rng(i), 40 + i)) for i in range(16)]
    uninterrupted = build_objective(name)
    expected = [uninterrupted(*batch) for batch in batches]
    first = build_objective(name)
    for batch in batches[:9]:
        first(*batch)
    second = build_objective(name)
    second.load_state_dict(transport(first.state_dict()))
    for batch, out in zip(batches[9:], expected[9:], strict=True):
        assert torch.equal(second(*batch).losses, out.losses)
    assert same_state(second.state_dict(), uninterrupted.state_dict())


@pytest.mark.parametrize("name", STATEFUL)
def test_a_saved_state_is_a_copy(name):
    objective = build_objective(name)
    batch = called(random_pairs(np.random.default_rng(0), 5))
    saved = objective.state_dict()
    untouched = build_objective(name).state_dict()
    objective(*batch)
    assert same_state(saved, untouched)
    other = build_objective(name)
    other.load_state_dict(saved)
    other(*batch)
    assert same_state(saved, untouched)
    assert not same_state(other.state_dict(), saved)


@pytest.mark.parametrize("name", TRAINED)
def test_evaluation_leaves_the_state_alone(name):
    rng = np.random.default_rng(1)
    objective, undisturbed = build_objective(name), build_objective(name)
    batches = [called(random_pairs(rng, size)) for size in (200, 100, 30)]
    for batch in batches:
        objective(*batch)
        undisturbed(*batch)
    before = objective.state_dict()
    objective.eval()
    outs = [objective(*batches[2]) for _ in range(2)]
    assert torch.equal(outs[0].losses, outs[1].losses)
    assert same_state(objective.state_dict(), before)
    objective.train()
    assert torch.equal(objective(*batches[0]).losses, undisturbed(*batches[0]).losses)


def test_evaluation_samples_from_the_queue():
    batch = pack(random_pairs(np.random.default_rng(2), 4))
    objective = build_objective("gamma-simpo", tau=1.0)
    alone = objective.eval()(*batch).target_margins
    objective.train()(*pack(random_pairs(np.random.default_rng(3), 200)))
    assert not torch.equal(objective.eval()(*batch).target_margins, alone)


def test_a_state_must_fit():
    lmpo, gamma = build_objective("lmpo"), build_objective("gamma-simpo")
    with pytest.raises(
        UserError, match=r"'lmpo': take one .*expected lmpo\.mean.*got gamma-simpo\.fill"
    ):
        lmpo.load_state_dict(gamma.state_dict())
    with pytest.raises(UserError, match=r"expected lmpo\.mean.*got nothing"):
        lmpo.load_state_dict(build_objective("simpo").state_dict())
    with pytest.raises(UserError, match=r"expected nothing, got lmpo\.mean"):
        build_objective("simpo").load_state_dict(lmpo.state_dict())
    short = gamma.state_dict()
    short["gamma-simpo.queue"] = short["gamma-simpo.queue"][:100]
    with pytest.raises(UserError, match=r"queue \(float64 \[2048\]\).*queue \(float64 \[100\]\)"):
        gamma.load_state_dict(short)
    with pytest.raises(UserError, match=r"lmpo\.mean \(float64 .*got.* lmpo\.mean \(float32"):
        lmpo.load_state_dict(lmpo.state_dict() | {"lmpo.mean": torch.zeros(())})
    numbers: Any = lmpo.state_dict() | {"lmpo.mean": 0.5}
    with pytest.raises(UserError, match=r"got.* lmpo\.mean \(float\)"):
        lmpo.load_state_dict(numbers)


# Pairs of each rank, batch by batch: unequal, none on one rank, more than a gamma-PO set.
SPLITS = [(3, 5), (0, 1), (4, 0), (1, 0), (130, 170), (20, 7), (90, 150), (1, 6)]


def global_batches() -> list[tuple[list[Pair], list[int], int]]:
    """Pairs, their ids, which are in no order, and how many of them are rank 0's."""
    rng = np.random.default_rng(4)
    return [
        (random_pairs(rng, a + b), rng.choice(10_000, a + b, replace=False).tolist(), a)
        for a, b in SPLITS
    ]


def run_rank(rank: int, folder: Path, capacity: int | None) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for name, given in COUPLED.items():
        objective = build_objective(name, **given)
        assert objective.couples_pairs
        objective.max_pairs_per_rank = capacity
        outs = []
        for step, (pairs, ids, split) in enumerate(global_batches()):
            objective.train(step != 5)
            mine = slice(0, split) if rank == 0 else slice(split, None)
            if pairs[mine]:
                batch, own_ids = called(pairs[mine]), ids[mine]
            elif step % 2:
                batch, own_ids = called([([-1.0], [-2.0])]), [-1]
            else:
                batch, own_ids = called([]), []
            pair_ids = torch.tensor(own_ids, dtype=torch.int64)
            out = objective(*batch, pair_ids=pair_ids, group=dist.group.WORLD)
            outs.append(torch.stack([out.target_margins, out.losses.detach()])[:, out.real])
        results[name] = outs, objective.state_dict()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("capacity", [None, 200])
def test_two_processes_equal_one(tmp_path, capacity):
    spawn(run_rank, (tmp_path, capacity), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, given in COUPLED.items():
        objective = build_objective(name, **given)
        assert objective.couples_pairs
        for step, (pairs, ids, _) in enumerate(global_batches()):
            out = objective.train(step != 5)(*called(pairs), pair_ids=torch.tensor(ids))
            margins, losses = torch.cat([rank[name][0][step] for rank in ranks], 1)
            assert torch.equal(margins, out.target_margins), (name, step)
            # Vector instructions round log1p otherwise than the loop over what they leave.
            torch.testing.assert_close(losses, out.losses, rtol=1e-14, atol=0)
        for rank in ranks:
            assert same_state(rank[name][1], objective.state_dict())


class NoReadBack(TorchDispatchMode):
    """Fails on operators that wait for the device: reading a value, sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(waiting) for waiting in self.WAITING), name
        if name.startswith("index"):
            indices = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]
            assert not any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("training", [True, False])
def test_reads_nothing_back_to_the_host(name, training):
    objective = build_objective(name, sft_weight=0.1).train(training)
    batch = called(random_pairs(np.random.default_rng(5), 3))
    ids = torch.tensor([4, -1, 2])
    with NoReadBack():
        objective(*batch, pair_ids=ids).loss.backward()
    with FakeTensorMode(allow_non_fake_inputs=True):  # holds no values: reading one raises
        fake = torch.randn(30, requires_grad=True)
        boundaries, ids = torch.zeros(7, dtype=torch.int32), torch.zeros(3).long()
        out = objective(fake, boundaries, reference=torch.zeros(6), pair_ids=ids)
        out.loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAINED)
def test_on_a_gpu_without_waiting_for_it(name):
    here, there = build_objective(name), build_objective(name)
    for step in range(4):
        pairs = random_pairs(np.random.default_rng(step), 150)
        tokens, cu_seqlens, reference = called(pairs)
        ids = torch.arange(len(pairs))
        expected = here(tokens, cu_seqlens, reference, pair_ids=ids)
        moved = [tensor.detach().cuda() for tensor in (tokens, cu_seqlens, reference, ids)]
        moved[0].requires_grad_()
        torch.cuda.synchronize()
        # The first call moves the state over, from memory that is not pinned.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            out = there(*moved[:3], pair_ids=moved[3])
            out.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(out.losses.cpu(), expected.losses, rtol=1e-10, atol=1e-12)
