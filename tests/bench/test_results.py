"""What becomes of the benchmarks' JSON: the page, README's tables, pictures, and who may write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import all as everything
from bench.lib import record
from bench.lib.record import RESULTS, ROOT, Commit
from bench.lib.table import CLOSE
from bench.report import page
from bench.report import pages as results

STATEMENT = "No figure on this page comes from a GPU."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the committed results."""
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_the_committed_page_is_what_its_json_makes() -> None:
    made = page.page(page.read_files(RESULTS), "../bench/results/")
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == made, "run `python -m bench.report`"


def test_the_page_s_pictures_and_files_are_there() -> None:
    for file in page.read_files(RESULTS):
        assert all((RESULTS / name).is_file() for name in file.pictures()), "bench.report"


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [
        ("README.md", "head", page.head_table),
        ("README.md", "training", page.training_rows),
        ("docs/how-the-head-works.md", "active", page.active_table),
    ],
)
def test_tables_are_made_of_the_committed_json(
    file: str, name: str, made: Callable[[Iterable[page.File]], str]
) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    between = text.partition(f"<!-- table:{name} -->\n")[2].partition(f"\n{CLOSE}")[0]
    assert between == made(page.read_files(RESULTS)), "run `python -m bench.report`"


def test_files_of_a_gpu_appear_without_further_work(folder: Path) -> None:
    assert STATEMENT in page.page(page.read_files(folder), "")
    for stem, source in (("head_shapes", "head_cpu"), ("training", "training_cpu")):
        content = json.loads((folder / f"{source}.json").read_text())
        for row in content["rows"]:
            row |= {"device": "cuda", "device_name": f"Some GPU of {stem}"}
        (folder / f"{stem}.json").write_text(json.dumps(content))
    tile = {"field": "forward", "tile": {"rows": 128}, "ms": 1.0}
    tune = {"commit": "0" * 40, "rows": [tile], "device_name": "Some GPU", "entries": {"bf16": "X"}}
    (folder / "tune.json").write_text(json.dumps(tune))
    text = page.page(page.read_files(folder), "")
    assert STATEMENT not in text
    assert "Not measured on a GPU yet: the head's scaling curves." in text
    for shown in (
        "Some GPU of head_shapes",
        "Some GPU of training",
        "tune.json",
        "head_shapes.png",
    ):
        assert shown in text


@pytest.mark.costly
def test_results_of_another_folder_leave_readme_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ROOT / "README.md").read_bytes()
    for path in folder.glob("*.json"):
        if path.stem not in ("head_cpu", "training_cpu"):
            path.unlink()
    assert results.main([str(folder)]) == 0
    assert (ROOT / "README.md").read_bytes() == before
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "](head_cpu.json)" in text
    for name in ("head_cpu.png", "training_cpu.png"):
        assert f"]({name})" in text
        assert (folder / name).stat().st_size > 10_000
    readme = folder / "page.md"
    readme.write_text(
        "a\n<!-- table:head -->\n<!-- /table -->\n<!-- table:training -->\n<!-- /table -->\n"
    )
    assert results.main([str(folder), "--readme", str(readme), "--no-pictures"]) == 0
    assert "trl-chunked" in readme.read_text()
    assert "trl-cpo" in readme.read_text()
    (folder / "empty").mkdir()
    capsys.readouterr()
    assert results.main([str(folder / "empty")]) == 2
    assert "has no JSON of results" in capsys.readouterr().err


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
    for part in everything.PARTS:
        assert find_spec(part.module) is not None
    assert everything.TOTAL_S < 600


@pytest.mark.costly
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
