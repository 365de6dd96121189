"""`make bench`: its parts, what a part that is cut leaves, and who may publish."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import all as everything
from bench.lib import real_model
from bench.lib.record import RESULTS, Commit
from bench.training import command as training
from bench.training.contenders import HYBRIDS


def test_make_bench_refuses_to_publish_from_a_dirty_tree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "find_commit", lambda: Commit("0" * 40, dirty=True))
    monkeypatch.setattr(everything, "run", lambda *_: pytest.fail("must refuse before it runs"))
    assert everything.main(["--out", str(RESULTS)]) == 2
    assert "uncommitted changes" in capsys.readouterr().err


@pytest.mark.costly
def test_a_part_that_is_cut_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--case", "tiny", "--providers", "full-logits", "--repeats", "1", "--no-memory")
    parts = (
        everything.Part("head", small, "head_cpu.json", 120),
        everything.Part("scaling", ("--base", "tiny"), "scaling_cpu.json", 0.2),
    )
    monkeypatch.setattr(everything, "PARTS", parts)
    monkeypatch.setattr(everything, "TOTAL_S", 200)
    out = tmp_path / "bench"
    assert everything.main(["--out", str(out), "--parts", "head", "scaling"]) == 1
    assert "scaling          skipped: no time is left" in capsys.readouterr().out
    text = (out / "results.md").read_text()
    assert "tiny: N 96" in text
    assert (out / "head_cpu.png").is_file()
    monkeypatch.setattr(everything, "run", lambda *_: "cut after 9 s")
    assert everything.main(["--out", str(out), "--parts", "head"]) == 1
    monkeypatch.setattr(everything, "run", lambda *_: "done in 9 s")
    assert everything.main(["--out", str(out), "--parts", "head"]) == 0


def test_parts_name_benchmarks_and_fit_the_time() -> None:
    for part in (*everything.PARTS, *everything.REAL_PARTS, *everything.HYBRID_PARTS):
        assert find_spec(part.module) is not None
    assert everything.TOTAL_S < 600


def test_real_takes_the_parts_of_the_real_model() -> None:
    assert everything.parse(["--real"]).parts == [part.name for part in everything.REAL_PARTS]
    assert everything.parse([]).parts == [part.name for part in everything.PARTS]
    for part in everything.REAL_PARTS:
        options = training.parse(list(part.arguments))
        assert options.model == real_model.FOLDER
        assert options.objective == ("dpo" if "dpo" in part.name else "simpo")
        assert options.batch % options.accumulation == 0


def test_hybrids_take_each_model_on_short_and_long_prompts() -> None:
    parts = everything.HYBRID_PARTS
    assert everything.parse(["--hybrids"]).parts == [part.name for part in parts]
    options = [training.parse(list(part.arguments)) for part in parts]
    taken = {(given.shape, given.long_prompts) for given in options}
    assert taken == {(shape, long) for shape in HYBRIDS for long in (False, True)}
