"""The benchmark harness, end to end on a tiny case."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.head import command as head
from bench.head import peers
from bench.head.harness import Settings, measure
from bench.head.providers import BASELINE, PROVIDERS, Provider
from bench.head.table import table
from bench.lib import record
from bench.lib.cases import CASES, Case
from bench.lib.exact import exact, relative_error
from bench.lib.record import ROOT, Commit

SMALL = Case("small", 48, 32, 700)
COMMIT = Commit("0" * 40, dirty=False)


def test_exact_agrees_with_autograd_in_fp64() -> None:
    case = SMALL.build("cpu")
    wanted = exact(case)
    hidden, weight = case.hidden.double(), case.weight.double()
    coefficients = case.coefficients.double()
    found = PROVIDERS[BASELINE].run(hidden, weight, case.targets, coefficients)
    for one, other in zip(found, (wanted.logp, wanted.dhidden, wanted.dweight), strict=True):
        assert relative_error(one, other) < 1e-5  # the baseline's softmax is fp32


def test_losses_and_coefficients_of_heads_that_give_one_loss() -> None:
    case = SMALL.build("cpu")
    wanted = exact(case)
    hidden, weight = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    means = logp.view(2, -1).mean(1)
    gap = peers.SIMPO["beta"] * (means[0] - means[1]) - peers.SIMPO["gamma"]
    losses = {
        peers.liger_simpo_reference: torch.nn.functional.softplus(-gap),
        peers.mean_cross_entropy_reference: -logp.mean(),
    }
    for reference, loss in losses.items():
        found = reference(case, wanted)
        torch.testing.assert_close(found.logp, loss.detach().view(1))
        expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        torch.testing.assert_close((found.dhidden, found.dweight), expected)


@pytest.mark.costly
def test_gate_compares_a_whole_loss_with_its_own_reference() -> None:
    def mean_loss(hidden, weight, targets):
        logp = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])
        return -logp.mean().view(1), None

    provider = Provider(
        "mean-loss", mean_loss, lambda *_: None, reference=peers.mean_cross_entropy_reference
    )
    (row,) = measure(SMALL, [provider], Settings(repeats=1, memory="none"), COMMIT)
    assert row["gate"] == "passed"
    assert row["products"] > 0
    assert row["fp32_logits_logp_error"] < 1e-4


@pytest.mark.parametrize("name", ["liger-simpo", "liger-scaled-ce", "trl-chunked"])
def test_peers_that_run_on_a_cpu_pass_the_gate(name: str) -> None:
    if reason := PROVIDERS[name].unavailable(SMALL, "cpu"):
        pytest.skip(reason)
    (row,) = measure(SMALL, [PROVIDERS[name]], Settings(repeats=1, memory="none"), COMMIT)
    assert row["gate"] == "passed", row.get("reason")


def test_gate_refuses_to_time_a_wrong_provider() -> None:
    good = PROVIDERS[BASELINE]

    def slightly_off(hidden, weight, targets):
        logp, stats = good.forward(hidden, weight, targets)
        return logp * 1.01, stats

    def broken(hidden, weight, targets):
        raise RuntimeError("no such kernel")

    wrong = replace(good, name="wrong", forward=slightly_off)
    failing = replace(good, name="failing", forward=broken)
    absent = Provider("absent", good.forward, lambda case, device: "not installed")
    providers = [good, wrong, failing, absent]
    rows = measure(SMALL, providers, Settings(repeats=1, memory="none"), COMMIT)
    states = {row["provider"]: row["gate"] for row in rows}
    assert states == {
        BASELINE: "passed",
        "wrong": "wrong",
        "failing": "failed to run",
        "absent": "not available",
    }
    timed = [row["provider"] for row in rows if "total_ms" in row]
    assert timed == [BASELINE]
    printed = table(rows)
    assert "no such kernel" in printed
    assert "not installed" in printed


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_head_writes_rows_and_prints_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "tiny", SMALL)
    out = tmp_path / "rows.json"
    names = [BASELINE, "widemargin-torch-mean", "trl-chunked"]
    status = head.main(
        ["--case", "tiny", "--providers", *names, "--repeats", "2", "--out", str(out)]
    )
    assert status == 0
    stored = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert stored["schema"] == 1
    assert [row["provider"] for row in stored["rows"]] == names
    assert capsys.readouterr().out.strip() == table(stored["rows"])
    base, ours, _ = stored["rows"]
    for row in (base, ours):
        assert row["gate"] == "passed"
        assert row["repeats"] == 2
        assert abs(row["entropy"] - 1.5) <= 0.2
        assert set(row["errors"]) == set(row["bounds"]) == {"logp", "dhidden", "dweight"}
        for half in ("forward_ms", "backward_ms", "total_ms"):
            assert set(row[half]) == {"median", "min", "max", "iqr"}
        assert {"op", "device_name", "threads", "versions", "commit", "dirty"} <= set(row)
        assert set(row["peak_extra_mib"]) == {"allocator", "rss"}
    assert base["speedup"]["total"] == 1
    assert 0 < ours["active_fraction"] <= 1
    # logits, their log-softmax and its gradient
    assert base["peak_extra_percent_of_logits"] == pytest.approx(300, abs=5)
    assert base["passes"] == 3
    # The forward, then recomputation and both gradients of what is active; the tail is thin here.
    assert ours["passes"] == pytest.approx(1 + 3 * ours["active_fraction"], rel=0.4)


def test_results_folder_takes_nothing_from_a_dirty_tree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "find_commit", lambda given: Commit("0" * 40, dirty=True))
    monkeypatch.setattr(head, "measure", lambda *_: pytest.fail("must refuse before it measures"))
    with pytest.raises(SystemExit, match="2"):
        head.main(["--case", "tiny"])
    assert "uncommitted changes" in capsys.readouterr().err


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_baselines_are_collected_only_when_asked_for() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings
