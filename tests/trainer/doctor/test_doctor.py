"""`widemargin doctor`: its findings, its exit status, and that nothing makes it raise."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from widemargin.kernels import reference
from widemargin.trainer.cli import main
from widemargin.trainer.doctor import kernels as doctor_kernels
from widemargin.trainer.doctor import machine as doctor
from widemargin.trainer.doctor import model as doctor_model

from tests.support import fake_kernels
from tests.support.tiny_models import TOKENIZER, tiny_model


def findings(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json", *arguments])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (status == 0)
    return status, {check["name"]: check for check in printed["checks"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_this_machine_is_fit_to_test_on(capsys: Any) -> None:
    status, found = findings(capsys)
    assert status == 0
    assert found["torch"]["detail"] == version("torch")
    assert found["deepspeed"]["status"] == "ok"  # there or not
    assert "GiB of memory" in found["CPU"]["detail"]
    assert found["head"]["detail"].startswith("triton" if torch.cuda.is_available() else "torch")
    assert found["attention"]["detail"].startswith("sdpa")
    assert any(name.startswith("linear_logprob (torch on cpu") for name in found)
    assert any(name.startswith("margin_loss (torch on cpu") for name in found)


def test_text_for_people(capsys: Any, model: str) -> None:
    assert main(["doctor", "--model", model]) == 0
    printed = capsys.readouterr().out
    titles = ("Packages", "Machine", "What a run would use", "Kernels, against fp64")
    titles += ("Other trainers",)
    assert [line for line in printed.splitlines() if line in titles] == list(titles)
    assert "  ok    torch: " in printed
    assert printed.splitlines()[-1].startswith("Ready to train.")


def test_a_model_is_told_without_its_weights(capsys: Any, model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    status, found = findings(capsys, "--model", str(tmp_path))
    assert status == 0
    assert "million parameters" in found["model"]["detail"]
    assert found["packing"]["detail"].split()[0] in ("padded", "packed", "prefix_shared")
    assert "answers end with" in found["chat template"]["detail"]


def test_a_kernel_that_leaves_a_model_padded_is_named(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mamba = tiny_model("mamba")
    mamba.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    _, found = findings(capsys, "--model", str(tmp_path))
    assert found["packing"]["detail"].startswith("prefix_shared")
    fake_kernels.install(monkeypatch, sys.modules[type(mamba).__module__])
    _, found = findings(capsys, "--model", str(tmp_path))
    assert found["packing"]["status"] == "warn"
    assert "selective_scan_fn cannot keep sequences of a row apart" in found["packing"]["detail"]


def test_a_model_that_is_not_there_or_not_one(capsys: Any, tmp_path: Path) -> None:
    status, found = findings(capsys, "--model", str(tmp_path / "nowhere"))
    assert status == 1
    assert "no such folder" in found["model"]["detail"]
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    status, found = findings(capsys, "--model", str(tmp_path))
    assert status == 1
    assert found["model"]["advice"] == "name a decoder-only language model"


def test_a_template_without_an_end_and_none_at_all(capsys: Any, model: str) -> None:
    tokenizer = Path(model) / "chat_template.jinja"
    before = tokenizer.read_text()
    try:
        tokenizer.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        _, found = findings(capsys, "--model", model)
        assert "no end" in found["chat template"]["detail"]
        tokenizer.unlink()
        status, found = findings(capsys, "--model", model)
        assert found["chat template"]["status"] == "warn"
        assert status == 0
    finally:
        tokenizer.write_text(before)


def test_packages_missing_old_or_broken(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    known = {"accelerate": "0.1", "flash-attn": "2.9", "liger-kernel": "0.1"}

    def version(name: str) -> str:
        if name == "peft":
            raise doctor.PackageNotFoundError(name)
        return known.get(name, "99.0")

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import of it fails
    found = {finding.name: finding for finding in doctor.packages()}
    assert (found["peft"].status, found["peft"].detail) == ("fail", "not installed")
    assert found["accelerate"].status == "fail"
    assert "0.1, expected >=" in found["accelerate"].detail
    assert "pip install 'accelerate>=" in found["accelerate"].advice
    assert found["flash-attn"].status == "warn"
    assert "cannot be imported" in found["flash-attn"].detail
    assert found["liger-kernel"].status == "warn"
    assert main(["doctor"]) == 1
    assert "2 to mend (fail)" in capsys.readouterr().out.splitlines()[-1]


def test_a_kernel_that_raises_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nkernel image")

    monkeypatch.setattr(doctor_kernels, "linear_logprob", broken)
    status, found = findings(capsys)
    assert status == 1
    failed = found["linear_logprob (torch on cpu, float32)"]
    assert (failed["status"], failed["detail"]) == ("fail", "RuntimeError: no kernel image")
    assert found["margin_loss (torch on cpu)"]["status"] == "ok"


@pytest.mark.parametrize("wrong", ["log-probs", "gradients of hidden", "of weight"])
@pytest.mark.parametrize("by", [1e-3, float("nan")])
def test_a_wrong_number_fails(wrong: str, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def bent(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
        """The reference with one of value, hidden's and weight's gradient off."""
        logps = reference.linear_logprob(hidden, weight, targets)
        if wrong == "log-probs":
            return logps + by
        leaf = hidden if wrong == "gradients of hidden" else weight
        return logps + (by * (leaf.sum() - leaf.sum().detach())).nan_to_num()

    monkeypatch.setattr(doctor_kernels, "linear_logprob", bent)
    check = next(doctor_kernels.kernel_checks())
    assert not check.fine
    assert [name for name, e in check.errors.items() if not e <= check.bound] == [wrong]


def test_whatever_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("driver\ngone")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(doctor_model, "choose_packing", broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("fail  this check: OSError: driver gone") == 3
    assert "Traceback" not in printed.out + printed.err
    assert "3 to mend (fail)" in printed.out.splitlines()[-1]


class Gpu:
    """As much of ``torch`` as the section on GPUs asks for."""

    __version__ = "2.13.0"

    class version:
        cuda: str | None = "13.0"

    class cuda:
        free = 70.0

        @staticmethod
        def get_device_properties(_: int) -> Any:
            return type("Properties", (), {"name": "NVIDIA T4", "major": 7, "minor": 5})

        @classmethod
        def mem_get_info(cls, _: int) -> tuple[float, float]:
            return cls.free * doctor.GIB, 80.0 * doctor.GIB


def test_gpus_that_are_old_full_or_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    old = doctor._gpu(Gpu, 0)
    assert old.status == "warn"
    assert "capability 7.5" in old.detail
    monkeypatch.setattr(doctor, "OLDEST_CAPABILITY", (7, 0))
    assert doctor._gpu(Gpu, 0).status == "ok"
    monkeypatch.setattr(Gpu.cuda, "free", 20.0)
    assert "something else uses it" in doctor._gpu(Gpu, 0).advice
    monkeypatch.setattr(doctor.os.path, "exists", lambda _: True)
    assert "cannot use it" in doctor._no_gpu(Gpu).detail
    monkeypatch.setattr(Gpu.version, "cuda", None)
    assert "built without CUDA" in doctor._no_gpu(Gpu).detail
