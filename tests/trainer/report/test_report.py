"""Reports: what they show, what they survive, and that nothing in them is live."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from widemargin.trainer.errors import UserError
from widemargin.trainer.monitor.collapse import SAMPLED_TOKENS
from widemargin.trainer.monitor.history import MAX_POINTS, load_run, thin
from widemargin.trainer.report.charts import nice_ticks, tick_label
from widemargin.trainer.report.marks import LOOKS, PALETTE
from widemargin.trainer.report.write import summary_lines, write_report
from widemargin.trainer.text import duration, figure

HOSTILE = """<script>alert("x")</script>'"><img src=http://evil.example/x onerror=alert(1)>"""


def evaluation(step: int, accuracy: float) -> dict[str, Any]:
    return {
        "step": step,
        "eval_loss": 3.0 - accuracy,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": 10 * (accuracy - 0.5),
        "eval_logps/chosen_mean": -7.4 + accuracy,
        "eval_logps/rejected_mean": -7.4 - accuracy,
        "eval_lengths/chosen": 6.25,
        "eval_lengths/rejected": 12.75,
    }


def training(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.0 / step,
        "grad_norm": 1.5,
        "learning_rate": 3e-3,
        "rewards/accuracies": 0.75,
        "rewards/margins": 2.0,
        "logps/chosen_mean": -2.0,
        "logps/rejected_mean": -4.0,
        "lengths/chosen": 6.0,
        "lengths/rejected": 13.0,
        "margin/mean": 1.0,
        "margin/std": 0.25,
        "pairs_per_s": 310.0,
    }


def history() -> list[dict[str, Any]]:
    end = {"step": 40, "train_runtime": 61.3, "train_samples_per_second": 200.0}
    middle = [training(step) for step in range(10, 41, 10)]
    return [evaluation(0, 0.51), *middle, evaluation(40, 0.97), end]


def make_run(folder: Path, logs: list[Any] | None = None, **notes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"log_history": history() if logs is None else logs}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if notes:
        (folder / "run.json").write_text(json.dumps(notes))
    return folder


def read_report(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The elements and attributes that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_headline_and_table_come_from_held_out_pairs(tmp_path: Path) -> None:
    lines = summary_lines(make_run(tmp_path))
    assert lines[0] == "Held-out accuracy 0.51 → 0.97 in 61 s"
    assert re.fullmatch(r" +before +after", lines[2])
    accuracy = next(line for line in lines if line.startswith("accuracy"))
    assert accuracy.split() == ["accuracy", "0.510", "0.970"]
    assert lines[-1] == "310 pairs per second"


def test_headline_falls_back_to_training_then_loss_then_steps(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "a", [{"step": 1, "rewards/accuracies": 0.5}])
    assert summary_lines(trained)[0] == "Training accuracy 0.50"
    losses = make_run(tmp_path / "b", [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 0.5}])
    assert summary_lines(losses)[0] == "Training loss 2 → 0.500"
    first, remedy = summary_lines(make_run(tmp_path / "c", [{"step": 7}]))
    assert (first, remedy.partition(";")[0]) == (
        "Trained 7 steps", "Set logging_steps: 1 to see losses and accuracies"
    )  # fmt: skip
    assert "Trained 7 steps" in read_report(tmp_path / "c")


def of_two_sets(folder: Path, **notes: Any) -> Path:
    """A run with ``eval_dataset={"easy": ..., "long ones": ...}``."""
    logs: list[Any] = [training(10), training(20)]
    for step, accuracy in ((0, 0.5), (20, 0.9)):
        for name, less in (("easy", 0.0), ("long ones", 0.25)):
            values = evaluation(step, accuracy - less)
            logs.append({key.replace("eval_", f"eval_{name}_"): values[key] for key in values})
    return make_run(folder, logs, **notes)


def test_several_evaluation_sets_are_held_out_pairs(tmp_path: Path) -> None:
    """They were left out, and the numbers were those of training."""
    lines = summary_lines(of_two_sets(tmp_path / "one"))
    assert lines[0] == "Held-out accuracy, easy 0.50 → 0.90"
    rows = [" ".join(line.split()) for line in lines]
    assert "accuracy, easy 0.500 0.900" in rows
    assert "accuracy, long ones 0.250 0.650" in rows
    drawn = read_report(tmp_path / "one")
    assert all(f"held-out, {name}" in drawn for name in ("easy", "long ones"))
    runs = [tmp_path / "one", of_two_sets(tmp_path / "two", settings={"beta": 1.0})]
    assert summary_lines(runs)[0] == "Held-out accuracy, easy: one 0.90, two 0.90"
    assert "accuracy, long ones 0.650 0.650" in [" ".join(s.split()) for s in summary_lines(runs)]
    page = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "held-out pairs, long ones" in page
    mixed = [runs[0], make_run(tmp_path / "other")]
    assert summary_lines(mixed)[0].startswith("Training accuracy:")


def test_columns_name_the_steps_they_hold(tmp_path: Path) -> None:
    late = make_run(tmp_path, [evaluation(10, 0.6), evaluation(20, 0.7), training(40)])
    assert summary_lines(late)[2].split() == ["step", "10", "step", "20"]


def test_every_chart_is_well_formed_and_stays_in_its_box(tmp_path: Path) -> None:
    page = read_report(make_run(tmp_path))
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "Reward accuracy",
        "Reward margin",
        "Log-probabilities",
        "Loss",
        "Target margin",
        "Lengths of the pairs",
        "Throughput",
        "Gradient norm",
        "Learning rate",
    ]
    assert len(charts) == len(titles)
    for chart in charts:
        tree = ElementTree.fromstring(chart)
        for dot in tree.iter("circle"):
            assert 0 <= float(dot.attrib["cx"]) <= 400
            assert 0 <= float(dot.attrib["cy"]) <= 210
    assert 'class="band accent"' in page


def test_missing_metrics_are_left_out(tmp_path: Path) -> None:
    page = read_report(make_run(tmp_path, [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 0.5}]))
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Loss"]
    assert "accuracy" not in page
    assert "How it was made" not in page


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = read_report(make_run(tmp_path, settings={"homepage": "https://example.org/a"}))
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in tags.seen}
    assert not {"src", "href", "xlink:href"} & {name for _, attrs in tags.seen for name in attrs}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    logs = [*history(), {"step": 41, HOSTILE: math.nan}]
    run_dir = make_run(
        tmp_path / "a'&<b>",
        logs,
        settings={"dataset": HOSTILE, "run_name": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: 1}]},
        objective={"name": HOSTILE},
        data={"train": {"skipped": {HOSTILE: 3}}},
        versions={"torch": HOSTILE},
        summary={"note": HOSTILE},
        samples=[{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}],
        started=HOSTILE,
        device=HOSTILE,
    )
    page = read_report(run_dir)
    plain = Tags(read_report(make_run(tmp_path / "plain", logs[:-1])))
    tags = Tags(page)
    more = {"details", "summary", "wbr", "div", "dl", "dt", "dd", "p"}
    assert {tag for tag, _ in tags.seen} <= {tag for tag, _ in plain.seen} | more
    assert not any(name.startswith("on") for _, attrs in tags.seen for name in attrs)
    assert "<script" not in page
    assert "<img" not in page
    assert "".join(tags.text).count(HOSTILE) >= 8


def test_values_that_are_not_finite_leave_a_gap_and_a_remark(tmp_path: Path) -> None:
    logs = history()
    logs[2]["loss"] = math.nan
    logs[3]["rewards/margins"] = math.inf
    logs += [{"step": 50, "loss": 10**400}, {"step": math.nan, "loss": 1.0}, "not a dict"]
    page = read_report(make_run(tmp_path, logs))
    assert "Not finite in the logs, left out above: loss (2), rewards/margins (1)." in page
    assert not re.search(r'd="[^"]*(nan|inf)', page)
    ends = [evaluation(0, math.nan), evaluation(1, math.nan)]
    assert summary_lines(make_run(tmp_path / "all", ends))[0] == "Trained 1 steps"
    assert write_report(tmp_path / "all").is_file()


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-320, 1e308, -1e308, 1e16, 7])
def test_flat_and_extreme_values_draw(tmp_path: Path, value: float) -> None:
    logs = [{"step": 1, "loss": value}, {"step": 2, "loss": value}, {"step": 3, "loss": -value}]
    page = read_report(make_run(tmp_path, logs))
    assert "<svg" in page
    assert not re.search(r'(d|cx|cy|x|y)="[^"]*(nan|inf)', page)


def test_extreme_values_and_dollars_draw_in_the_image(tmp_path: Path) -> None:
    logs = [{"step": 1, "loss": 1e308}, {"step": 2, "loss": -1e308}, {"step": 3, "loss": math.nan}]
    many = [make_run(tmp_path / name, logs, settings={"a": name}) for name in ("$x", "y$^{$")]
    assert write_report(many[0], form="png").read_bytes().startswith(b"\x89PNG")
    assert write_report(many, form="png").read_bytes().startswith(b"\x89PNG")


def test_an_image_of_nothing_is_an_image(tmp_path: Path) -> None:
    out = write_report(make_run(tmp_path, [{"step": 7}]), form="png")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_page_has_a_rule_for_each_kind_and_colour_of_marks(tmp_path: Path) -> None:
    page = read_report(make_run(tmp_path))
    seen = {
        names
        for tag in re.findall(r'<(?:path|circle) class="([^"]*)"', page)
        for names in tag.split()
    }
    assert {"gridline", "line", "band", "thin", "accent", "rule"} <= seen <= {*LOOKS, *PALETTE}
    assert all(f"svg .{kind}{{" in page for kind in LOOKS)
    assert all(page.count(f"--{name}:") == 2 for name in PALETTE)


def test_newest_checkpoint_stands_in_for_an_unfinished_run(tmp_path: Path) -> None:
    for step, accuracy in ((90, 0.6), (1000, 0.8), (200, 0.7)):
        make_run(tmp_path / f"checkpoint-{step}", [evaluation(step, accuracy)])
    make_run(tmp_path / "checkpoint-best", [evaluation(1, 0.1)])
    assert summary_lines(tmp_path)[0] == "Held-out accuracy 0.80"


def test_out_names_another_file(tmp_path: Path) -> None:
    out = write_report(make_run(tmp_path / "run"), tmp_path / "deep" / "page.html")
    assert out == tmp_path / "deep" / "page.html"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "found no trainer_state.json"),
        ({"trainer_state.json": "{"}, "expected readable JSON"),
        ({"trainer_state.json": "[]"}, "expected a JSON object, got list"),
        ({"trainer_state.json": "{}"}, "expected a list log_history"),
        ({"trainer_state.json": '{"log_history": []}', "run.json": "?"}, "expected readable JSON"),
    ],
    ids=["empty", "broken", "list", "no-history", "broken-notes"],
)
def test_bad_folders_are_one_line_errors(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no folder .*gone"):
        summary_lines(tmp_path / "gone")


def test_notes_of_the_wrong_shape_are_ignored(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, settings=[1], samples=3, data="x", started=5))
    assert (run.settings, run.samples, run.data) == ({}, [], {})
    assert write_report(tmp_path).is_file()


def test_log_probs_that_are_no_means_are_not_called_means(tmp_path: Path) -> None:
    """TRL logs sums over tokens under the names without an end."""
    logs = [{"step": i, "logps/chosen": -250.0 - i, "logps/rejected": -300.0} for i in (1, 2)]
    theirs, ours = make_run(tmp_path / "trl", logs), make_run(tmp_path / "ours")
    page = write_report(theirs).read_text()
    assert "Log-probabilities" in page
    assert "nats per token" not in page
    assert "-252" not in "".join(summary_lines(theirs))
    both = "".join(summary_lines([theirs, ours]))
    assert "-252" not in both


def test_long_runs_are_thinned_by_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    few = thin(points)
    assert len(few) <= MAX_POINTS
    assert sum(value for _, value in few) / len(few) == pytest.approx(0.5, abs=0.03)
    assert all(math.isnan(value) for _, value in thin([(s, math.nan) for s, _ in points]))


@given(st.floats(-1e12, 1e12, allow_subnormal=False), st.floats(1e-6, 1e12), st.integers(2, 8))
def test_ticks_enclose_the_values(low: float, span: float, count: int) -> None:
    high = low + span
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 3
    assert all(tick_label(tick, ticks) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.9682, "0.968"),
        (-4.7, "-4.70"),
        (22.66, "22.7"),
        (312.4, "312"),
        (1250.4, "1250"),
        (0.0025, "0.0025"),
        (3e-6, "3e-06"),
        (5.0, "5"),
        (2.5e9, "2.5e+09"),
    ],
)
def test_figures_are_short(value: float, expected: str) -> None:
    assert figure(value) == expected


def test_speed_counts_slow_stretches_by_their_time(tmp_path: Path) -> None:
    logs = [{"step": 1, "pairs_per_s": 300.0}, {"step": 2, "pairs_per_s": 100.0}]
    run = load_run(make_run(tmp_path, [*logs, {"step": 3, "pairs_per_s": math.nan}]))
    assert run.pairs_per_s() == pytest.approx(150.0)


def test_the_share_of_padded_tokens_is_said(tmp_path: Path) -> None:
    shares = (0.52, 0.56, math.nan)
    logs = [{"step": i, "tokens/computed_vs_padded": share} for i, share in enumerate(shares)]
    assert "0.54 of padded tokens computed" in read_report(make_run(tmp_path, logs))


def test_lengths_of_sampled_answers_are_drawn(tmp_path: Path) -> None:
    """Step 5 was written again by a resumed run; its last answers count."""
    rows = [(0, "a", 90), (0, "b", 10), (5, "a", 99), (5, "a", 20), (5, "b", 40), (6, "a", None)]
    make_run(tmp_path, [{"step": 9, "loss": 1.0}])
    lines = [{"step": s, "prompt": p, "answer": "x", "tokens": n} for s, p, n in rows]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_run(tmp_path).series(SAMPLED_TOKENS) == [(0, 50), (5, 30)]
    assert "Lengths of sampled answers" in read_report(tmp_path)


def test_signs_of_a_collapse_are_said(tmp_path: Path) -> None:
    logs = [{"step": i, "logps/chosen_mean": -1.0 if i < 20 else -3.0} for i in range(1, 40)]
    page = read_report(make_run(tmp_path, logs))
    assert "Signs of a collapse, step 25: the chosen answers" in page
    assert "Signs of a collapse" not in read_report(make_run(tmp_path / "fine", logs[:20]))


def test_empty_parts_of_the_notes_are_left_out(tmp_path: Path) -> None:
    page = read_report(make_run(tmp_path, data={"skipped": {}, "notes": [], "strict": False}))
    assert "<th>strict</th><td>false</td>" in page
    assert "<th>notes" not in page


def test_durations_read_naturally() -> None:
    said = [duration(seconds) for seconds in (0.04, 8.44, 9.96, 61.3, 150.2, 179.9, 720, 12_000)]
    assert said == ["0.0 s", "8.4 s", "10 s", "61 s", "150 s", "3 min", "12 min", "3 h 20 min"]


def test_answers_with_unicode_line_ends_are_shown(tmp_path: Path) -> None:
    row = {"step": 0, "prompt": "p", "answer": "one\u2028two\u0085three", "tokens": 3}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    make_run(tmp_path)
    (tmp_path / "samples.jsonl").write_text(line, encoding="utf-8")
    assert load_run(tmp_path).step_samples == [row]


def test_a_run_shorter_than_its_first_log_has_its_steps(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    assert summary_lines(tmp_path)[0] == "Trained 3 steps"
