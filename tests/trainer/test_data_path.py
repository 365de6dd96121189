"""Between the data set and the step: workers, pinned memory, and no waiting for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from widemargin.kernels.margin_loss.function import _check_boundaries
from widemargin.trainer import PreferenceConfig

from tests.support.tiny_models import parameters_of, tiny_config, tiny_model, tiny_trainer

OBJECTIVES = ["simpo", "lmpo", "gamma-simpo"]
WAITS = {"_local_scalar_dense", "nonzero", "item", "masked_select", "equal", "_unique2"}
"""Operations whose result the host must wait for."""
CHECKS_OF_A_CPU = {"_check_boundaries"}
"""Functions that look at values, and return at once for tensors that are elsewhere."""


def _refused(name: str) -> Any:
    """The method, for the torch head, which is made for CPUs, and what a CPU alone checks."""
    method = getattr(torch.Tensor, name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        code = sys._getframe(1).f_code
        caller = Path(code.co_filename).name
        if (
            caller.startswith(("torch_forward", "torch_backward"))
            or code.co_name in CHECKS_OF_A_CPU
        ):
            return method(*args, **kwargs)
        raise AssertionError(f"{name} in {caller} waits for the device")

    return refuse


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __enter__(self) -> Any:
        self._patched = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):  # which a CPU tensor does without an operation
            self._patched.setattr(torch.Tensor, name, _refused(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patched.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        # Without output_size the number of repeats is read back.
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or by_mask or repeats:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(),
    lambda x: x.tolist(),
    lambda x: x[x > 0],
    lambda x: x.repeat_interleave((x > 0).long()),
    lambda x: torch.where(x > 0),
    lambda x: x.cpu().numpy(),
    lambda x: bool(x.isnan().any()),
])  # fmt: skip
def test_waiting_is_noticed(wait):
    x = torch.tensor([1.0, -1.0])
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        wait(x)


@pytest.mark.parametrize("packing", ["padded", "packed", "prefix_shared"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_wait_for_the_device(tmp_path, objective, packing):
    """Loss, backward and metrics of a micro-batch, and the count of the step's pairs."""
    trainer = tiny_trainer(tmp_path, objective=objective, packing=packing, head_tail="mean")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.create_optimizer()
    trainer.training_step(trainer.model, batch, torch.tensor(4))  # what is computed once
    with NoWaiting():
        pairs = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        trainer.training_step(trainer.model, batch, pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_on_a_gpu_does_not_wait_for_it(tmp_path, objective):
    trainer = tiny_trainer(tmp_path, objective=objective, use_cpu=False, head_tail="mean")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.create_optimizer()
    pairs = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.training_step(trainer.model, batch, pairs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pairs = trainer._get_num_items_in_batch([batch], trainer.args.device)
        trainer.training_step(trainer.model, batch, pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_by_default(tmp_path, monkeypatch):
    workers = PreferenceConfig.__dataclass_fields__["dataloader_num_workers"].default_factory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers() == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workers() == 0
    config: Any = tiny_config(tmp_path)
    assert not config.dataloader_persistent_workers
    assert not config.dataloader_pin_memory
    assert not config.accelerator_config.non_blocking
    assert tiny_config(tmp_path, dataloader_num_workers=1).dataloader_num_workers == 1
    none = tiny_config(tmp_path, dataloader_num_workers=0, dataloader_persistent_workers=True)
    assert not none.dataloader_persistent_workers


@pytest.mark.costly
def test_workers_load_the_same_batches(tmp_path):
    models = []
    for settings in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = tiny_trainer(tmp_path, max_steps=7, **settings)  # past two epochs' ends
        trainer.train()
        models.append(parameters_of(trainer.model))
    assert torch.equal(*models)


@pytest.mark.costly
@pytest.mark.parametrize("packing", ["padded", "packed", "prefix_shared"])
def test_torch_compile_trains(tmp_path, packing):
    """Two steps through torch.compile, of different shapes, give what they give without."""
    common = {"max_steps": 2, "packing": packing}
    models = [tiny_model(num_hidden_layers=1) for _ in range(3)]  # compiling takes long
    plain = tiny_trainer(tmp_path, models[0], **common)
    plain.train()
    compiled = tiny_trainer(
        tmp_path, models[1], torch_compile=True, torch_compile_backend="aot_eager", **common
    )
    compiled.train()
    torch.testing.assert_close(
        parameters_of(compiled.model), parameters_of(plain.model), atol=1e-6, rtol=1e-5
    )
    assert (parameters_of(plain.model) - parameters_of(models[2])).abs().max() > 1e-2


def test_checks_of_a_cpu_leave_other_devices_alone():
    """A meta tensor has no values to look at: reading one would raise."""
    _check_boundaries(torch.empty(5, dtype=torch.int32, device="meta"), 7)
    with pytest.raises(ValueError, match="expected ascending boundaries"):
        _check_boundaries(torch.tensor([0, 9, 3], dtype=torch.int32), 7)
