"""Comparisons: which runs belong together, bands over seeds, margins over pairs, the image."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.monitor.margins import (
    BINS,
    EDGES,
    MARGINS_FILE,
    WIDTH,
    Histogram,
    line_of,
    read_margins,
)
from widemargin.trainer.report.compare import range_of
from widemargin.trainer.report.groups import differences, group_runs
from widemargin.trainer.report.ridges import Ridge, shape
from widemargin.trainer.report.write import load_runs, summary_lines, write_report

from tests.trainer.report.test_report import HOSTILE, Tags, evaluation, history, make_run, training


def run_of(folder: Path, objective: str, seed: int, end: float = 0.9, **settings: Any) -> Path:
    logs = [evaluation(0, 0.5), training(10), training(20), evaluation(20, end)]
    return make_run(
        folder / f"{objective}-{seed}-{end}",
        logs,
        settings={"objective": objective, "seed": seed, "output_dir": f"x{seed}", **settings},
        objective={"name": objective, "beta": 2.0, **settings.pop("objective_args", {})},
    )


def test_runs_that_differ_in_seed_and_folder_are_one_group(tmp_path: Path) -> None:
    folders = [run_of(tmp_path, name, seed) for name, seed in (("lmpo", 0), ("simpo", 0))]
    folders += [run_of(tmp_path, "lmpo", 1), run_of(tmp_path, "lmpo", 2, learning_rate=1e-3)]
    groups = group_runs(load_runs(folders))
    assert [len(group.runs) for group in groups] == [2, 1, 1]
    assert len({group.label for group in groups}) == 3
    assert differences([group.runs for group in groups]) == {
        "objective.name": ["lmpo", "simpo", "lmpo"],
        "learning_rate": [None, None, 1e-3],
    }


def test_labels_are_what_differs(tmp_path: Path) -> None:
    two = [run_of(tmp_path, "lmpo", 0), run_of(tmp_path, "simpo", 0)]
    assert [group.label for group in group_runs(load_runs(two))] == ["lmpo", "simpo"]
    rates = [run_of(tmp_path, "lmpo", s, learning_rate=r) for s, r in ((3, 1e-3), (4, 1e-4))]
    labels = [group.label for group in group_runs(load_runs(rates))]
    assert labels == ["learning_rate 0.001", "learning_rate 0.0001"]


def test_how_often_a_run_writes_tells_none_apart(tmp_path: Path) -> None:
    often = run_of(tmp_path, "lmpo", 0, logging_steps=1, save_strategy="no")
    seldom = run_of(tmp_path, "lmpo", 1, logging_steps=5, save_steps=100)
    assert [len(group.runs) for group in group_runs(load_runs([often, seldom]))] == [2]


def test_runs_without_notes_stay_apart(tmp_path: Path) -> None:
    groups = group_runs(load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    assert [group.label for group in groups] == ["a", "b"]


def test_the_line_is_the_mean_and_the_band_the_range(tmp_path: Path) -> None:
    folders = [run_of(tmp_path, "lmpo", seed, end) for seed, end in enumerate((0.7, 0.9, 0.8))]
    (group,) = group_runs(load_runs(folders))
    line = group.line("eval_rewards/accuracies")
    assert line.points == [(0, pytest.approx(0.5)), (20, pytest.approx(0.8))]
    assert line.low is not None
    assert line.high is not None
    assert (line.low[-1], line.high[-1]) == ((20, 0.7), (20, 0.9))
    page = write_report(folders).read_text(encoding="utf-8")
    assert 'class="band c0"' in page
    assert "Held-out accuracy 0.80 over 3 seeds" in page
    assert "0.800 (0.700 to 0.900)" in page


def test_a_value_that_is_not_finite_leaves_the_other_seeds(tmp_path: Path) -> None:
    folders = [run_of(tmp_path, "lmpo", 0, 0.7), run_of(tmp_path, "lmpo", 1, math.nan)]
    (group,) = group_runs(load_runs(folders))
    assert group.line("eval_rewards/accuracies").points[-1] == (20, pytest.approx(0.7))
    page = write_report(folders).read_text(encoding="utf-8")
    assert "not finite in the logs, left out above: eval_loss (1)" in page
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_the_comparison_page_and_lines(tmp_path: Path) -> None:
    folders = [run_of(tmp_path, "lmpo", s, 0.9) for s in (0, 1)] + [
        run_of(tmp_path, "simpo", 0, 0.8)
    ]
    out = write_report(folders)
    assert out == tmp_path / "report.html"
    page = out.read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    first = ["Reward accuracy", "Reward margin", "Log-prob, chosen", "Log-prob, rejected", "Loss"]
    assert titles[:5] == first
    assert "2 settings, 3 runs" in page
    assert "<th>objective.name</th>" in page
    assert "<th>seed</th>" in page
    lines = summary_lines(folders)
    assert lines[0] == "Held-out accuracy: lmpo 0.90, simpo 0.80"
    assert lines[2].split() == ["lmpo", "simpo"]
    assert "last step" not in page


def test_runs_that_end_apart_show_their_last_steps(tmp_path: Path) -> None:
    whole, killed = run_of(tmp_path, "lmpo", 0), run_of(tmp_path, "simpo", 0)
    make_run(killed, [evaluation(0, 0.5), training(10), evaluation(10, 0.8)])
    lines = summary_lines([whole, killed])
    assert lines[3].split() == ["last", "step", "20", "10"]
    assert "<th>last step</th>" in write_report([whole, killed]).read_text(encoding="utf-8")


def test_nothing_in_a_comparison_is_live(tmp_path: Path) -> None:
    folders = []
    for i in range(2):
        folder = make_run(
            tmp_path / f"r{i}",
            [*history(), {"step": 41, HOSTILE: math.nan}],
            settings={"run_name": f"{HOSTILE}{i}", HOSTILE: i},
            objective={"name": f"{i}{HOSTILE}"},
            data={HOSTILE: HOSTILE},
            versions={"x": HOSTILE},
        )
        row = {"step": 0, "prompt": HOSTILE, "answer": HOSTILE, "tokens": 3}
        (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
        folders.append(folder)
    for page in (write_report(folders), write_report(folders[0])):
        content = page.read_text(encoding="utf-8")
        tags = Tags(content)
        assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags.seen}
        assert not any(name.startswith("on") for _, attrs in tags.seen for name in attrs)
        assert "".join(tags.text).count(HOSTILE) >= 4


def test_a_run_without_a_folder_is_named_and_runs_count_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no folder .*gone"):
        write_report([make_run(tmp_path / "a"), tmp_path / "gone"])
    with pytest.raises(UserError, match="name the output folder"):
        write_report([])
    assert len(load_runs([tmp_path / "a", tmp_path / "a"])) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_the_image(tmp_path: Path, count: int) -> None:
    folders = [run_of(tmp_path, "lmpo", seed) for seed in range(count)]
    for folder in folders:
        counts = [0] * BINS
        counts[390:400] = [3] * 10
        (folder / MARGINS_FILE).write_text(line_of(20, {"reward_margins": counts}))
    out = write_report(folders, form="png")
    assert out.suffix == ".png"
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_margins_name_their_runs_in_a_legend_and_their_steps_beside(tmp_path: Path) -> None:
    counts = [0] * BINS
    counts[300:400] = [1] * 100
    folders = [run_of(tmp_path, "lmpo", 0), run_of(tmp_path, "simpo", 0)]
    for folder in folders:
        lines = [line_of(step, {"reward_margins": counts}) for step in (0, 20)]
        (folder / MARGINS_FILE).write_text("".join(lines))
    both = write_report(folders).read_text(encoding="utf-8")
    assert '<span class="c1"><i></i></span>simpo</li></ul><svg' in both
    one = write_report(folders[0]).read_text(encoding="utf-8")
    assert re.findall(r'text-anchor="end">(step \d+|\d+%)<', one) == [
        "step 0",
        "80%",
        "step 20",
        "80%",
    ]


def test_ranges_that_read_the_same_are_one_number() -> None:
    assert range_of([-10.31, -10.34]) == "-10.3"
    assert range_of([0.1, 0.3]) == "0.200 (0.100 to 0.300)"
    assert range_of([]) == ""


def test_a_histogram_tells_quantiles_and_shares() -> None:
    counts = [0] * BINS
    counts[BINS // 2 - 1], counts[BINS // 2] = 1, 3
    histogram = Histogram(counts)
    assert (histogram.pairs, histogram.share_above_zero()) == (4, 0.75)
    assert EDGES[BINS // 2] == 0
    assert histogram.below(0.0) == pytest.approx(0.25)
    assert histogram.quantile(0.25) == pytest.approx(0.0)
    assert histogram.below(histogram.quantile(0.6)) == pytest.approx(0.6)
    assert histogram.below(1e9) == 1.0


def test_ridges_keep_nearly_all_pairs_and_their_place() -> None:
    counts = [0] * BINS
    counts[480:486] = [5, 10, 20, 20, 10, 5]
    shapes = shape([Ridge("a", "c0", Histogram(counts))])
    assert shapes.low <= 0 < EDGES[480] < shapes.high
    peak = max(range(len(shapes.heights[0])), key=shapes.heights[0].__getitem__)
    at = shapes.low + (peak + 0.5) * (shapes.high - shapes.low) / len(shapes.heights[0])
    assert EDGES[478] < at < EDGES[488]


def test_margins_are_read_past_what_a_killed_run_left(tmp_path: Path) -> None:
    one, two = [1] + [0] * (BINS - 1), [0] * (BINS - 1) + [2]
    lines = [
        line_of(4, {"reward_margins": one}),
        line_of(2, {"reward_margins": one}),
        '{"step": 6, "sca\n',
        "[]\n",
        line_of(4, {"reward_margins": two}),
        '{"step": 8, "scale": 1, "width": 0.1, "bins": 160}\n',
        line_of(9, {"reward_margins": [0] * BINS}),
    ]
    (tmp_path / MARGINS_FILE).write_text("".join(lines))
    by_step = read_margins(tmp_path)["reward_margins"]
    assert list(by_step) == [2, 4]
    assert by_step[4].counts == two


@pytest.mark.parametrize(
    "broken",
    [
        {"first": -1, "counts": [1]},
        {"first": 630, "counts": [1] * 20},
        {"first": 0, "counts": []},
        {"first": 0, "counts": [-1]},
        {"first": 0, "counts": "11"},
        {"first": None},
        3,
    ],
)
def test_histograms_that_cannot_be_are_passed_over(tmp_path: Path, broken: Any) -> None:
    entry = {"step": 1, "scale": 0.1, "width": WIDTH, "bins": BINS, "reward_margins": broken}
    (tmp_path / MARGINS_FILE).write_text(json.dumps(entry) + "\n")
    assert read_margins(tmp_path)["reward_margins"] == {}
