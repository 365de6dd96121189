"""What becomes of the benchmarks' JSON: the page, README's tables, pictures, and who may write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bench.lib.record import RESULTS, ROOT
from bench.lib.table import CLOSE
from bench.report import page, readme
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


def test_the_largest_difference_of_losses_is_that_of_every_case() -> None:
    rows = json.loads((RESULTS / "training_real_cpu.json").read_text(encoding="utf-8"))["rows"]
    largest = max(row["largest_loss_gap"] for row in rows if row["objective"] == "dpo")
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"dpo, short prompts: {largest:.0e}" in written


def test_the_page_s_pictures_and_files_are_there() -> None:
    for file in page.read_files(RESULTS):
        assert all((RESULTS / name).is_file() for name in file.pictures()), "bench.report"


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [
        ("README.md", "claim", readme.claim),
        ("README.md", "training", readme.table),
        ("docs/kernel.md", "head", page.head_table),
        ("docs/how-it-works.md", "shares", lambda _: readme.share_table()),
        ("docs/how-the-head-works.md", "active", page.active_table),
        ("docs/how-the-head-works.md", "adamw", page.adamw_table),
        ("docs/performance.md", "hybrids", page.hybrid_table),
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
    front = folder / "page.md"
    front.write_text(
        "a\n<!-- table:claim -->\n<!-- /table -->\n<!-- table:training -->\n<!-- /table -->\n"
    )
    assert results.main([str(folder), "--readme", str(front), "--no-pictures"]) == 0
    assert "times as fast as TRL" in front.read_text()
    assert "| SimPO, " in front.read_text()
    (folder / "empty").mkdir()
    capsys.readouterr()
    assert results.main([str(folder / "empty")]) == 2
    assert "has no JSON of results" in capsys.readouterr().err


def steps(provider: str, pairs_per_s: float, **facts: object) -> dict[str, object]:
    row = json.loads((RESULTS / "training_cpu.json").read_text())["rows"][0]
    return row | {"provider": provider, "pairs_per_s": pairs_per_s, **facts}


def training_file(*rows: dict[str, object]) -> page.File:
    return page.File(Path("training.json"), "training", {"rows": list(rows)})


def test_readme_shows_the_real_model_as_soon_as_it_was_measured() -> None:
    toy = training_file(steps("widemargin-prefix_shared", 9.0), steps("trl-cpo", 1.0))
    real = {"case": readme.REAL, "spread": 0.1, "peak_mib": 100.0}
    quiet = training_file(
        steps(readme.BEST, 2.0, **real), steps("trl-cpo", 1.0, **real | {"peak_mib": 200.0})
    )
    assert "9.0 times as fast" in readme.claim([toy])
    assert "noise was not measured" in readme.table([toy])
    assert f"{readme.REAL} with SimPO 2.0 times as fast as TRL, in 50% of" in readme.claim(
        [toy, quiet]
    )
    assert "nois" not in readme.table([toy, quiet])
    assert "11M" not in readme.table([toy, quiet])
    noisy = training_file(*(row | {"spread": 0.4} for row in quiet.rows))
    assert "steps spread by 40%" in readme.table([noisy])
    trees = {"case": readme.REAL + readme.BY_PROMPT, "objective": "simpo"}
    by_prompt = training_file(*(row | trees for row in quiet.rows))
    by_prompt.rows[0] |= {"provider": readme.TREES, "pairs_per_s": 3.7}
    both = readme.table([by_prompt, quiet])
    sentence = readme.claim([by_prompt, quiet])
    assert "SimPO 2.0 times" in sentence
    assert "with all pairs of each prompt, 3.7 times, in 50%." in sentence
    pairs, grouped = [line for line in both.splitlines() if line.startswith("| SimPO")]
    assert "prefix shared | 2.00 | 1.00 | 2.00 | 50% |" in pairs
    assert "all of each prompt, trees | 3.70 | 1.00 | 3.70 | 50% |" in grouped
    lora = training_file(*(row | {"lora": True} for row in quiet.rows))
    assert "SimPO, LoRA, " in readme.table([lora, quiet])
    assert "LoRA" not in readme.claim([lora, quiet])
    gpu = training_file(*(r | {"device": "cuda", "device_name": "Some GPU"} for r in quiet.rows))
    assert readme.claim([toy, quiet, gpu]).startswith("**On Some GPU")


def test_a_case_without_trl_makes_no_claim() -> None:
    alone = training_file(steps(readme.BEST, 2.0))
    with pytest.raises(ValueError, match="make bench-real"):
        readme.claim([alone])


def test_the_head_is_a_fifth_at_135m_and_a_fifteenth_at_8b() -> None:
    shares = [readme.head_share(shape) for shape in readme.SHARES.values()]
    assert shares == pytest.approx([28.3 / 134.5, 262.7 / 1235.7, 525.3 / 7504.9], rel=5e-3)


def test_layouts_of_hybrids_are_compared_with_padded_rows() -> None:
    case = {"case": "falcon-h1-10m", "others_load": 0.01, "spread": 0.02}
    padded = steps("widemargin-padded", 2.0, **case)
    file = training_file(
        padded, steps(readme.BEST, 3.0, **case), steps("trl-cpo", 1.0, **case),
        steps(readme.BEST, 9.0, **case | {"case": "small_lm"}),
    )  # fmt: skip
    shown = page.hybrid_table([file])
    assert "| prefix_shared | 3.00 | 1.50 |" in shown
    assert "two fastest times differed by at most 2%" in shown
    assert "trl" not in shown
    assert "9.00" not in shown
    alone = steps(readme.BEST, 3.0, **case)
    assert "| prefix_shared | 3.00 | – |" in page.hybrid_table([training_file(alone)])
    assert "bench.all --hybrids" in page.hybrid_table([])
