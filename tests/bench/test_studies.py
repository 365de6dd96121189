"""The studies: runs are carried out, kept by line and compared seed by seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.lib import real_model
from bench.lib.record import ROOT
from bench.lib.table import CLOSE
from bench.studies.command import model_of, parse, planned
from bench.studies.preparing import prepare_model, prepare_pairs
from bench.studies.questions import STUDIES, Run
from bench.studies.records import append, by_arm, is_done, mean_and_error, paired, read
from bench.studies.report import write_report
from bench.studies.tables import TABLES, gaps, smoothed, tail_pairs
from bench.studies.worker import carry_out
from tests.support.eval_files import save_model, save_pairs
from tests.support.tiny_models import TOKENIZER


def small(run: Run) -> Run:
    return dataclasses.replace(run, steps=2, pairs_per_step=2, measure_every=1)


@pytest.mark.costly
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_of_every_kind(tmp_path, adapter):
    model = Path(save_model(tmp_path / "model"))
    pairs = prepare_pairs(
        Path(save_pairs(tmp_path / "all.jsonl")), model, 10**6, tmp_path / "fit.jsonl"
    )
    for study, run in ((name, small(runs(0)[-1])) for name, runs in STUDIES.items()):
        run = dataclasses.replace(run, settings=run.settings | {"use_peft": adapter})
        start = prepare_model(model, run.sharpen, tmp_path)
        found = carry_out(run, start, pairs, pairs)
        assert [m["step"] for m in found["measurements"]] == [0, 1, 2]
        assert ("answers" in found["measurements"][0]) == (study in ("length", "real"))
        assert len(found["curves"]["loss"]) == 2
        assert found["train_pairs"] == 9
        assert None not in found["curves"]["active_fraction"], "the run's own head, measured or not"


def test_settings_for_every_run():
    given = ["--set=use_peft=true", "--set=learning_rate=5e-5", "--seeds=1"]
    runs = list(planned(parse(["length", *given, "--report"])))
    assert all(run.settings["use_peft"] is True for run in runs)
    assert all(run.settings["learning_rate"] == 5e-5 for run in runs)
    assert {run.settings["objective"] for run in runs} == {"simpo", "lmpo"}


def test_only_pairs_that_fit_whole(tmp_path):
    source = Path(save_pairs(tmp_path / "all.jsonl"))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    counts = [
        len(
            prepare_pairs(source, tmp_path / "tokenizer", n, tmp_path / "some")
            .read_text()
            .split("\n")
        )
        for n in (1, 40, 10**6)
    ]
    assert counts[0] == 1, "none, and what follows the last line's end"
    assert counts[0] < counts[2] == 10


def test_sharpened_logits(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source = Path(save_model(tmp_path / "model"))
    ids = torch.arange(1, 9)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for folder in (source, prepare_model(source, 3.0, tmp_path))
    ]
    torch.testing.assert_close(logits[1], 3 * logits[0])


def record(run: Run, **changes: object) -> dict:
    """What a run might have left."""
    answers = {"mean_tokens": 200.0 + run.seed, "answers": 4, "cut": 1, "repetition": 0.1}
    group = {"pairs": 3, "accuracy": 0.5, "margin": 0.1}
    measurement = {
        "accuracy": 0.5 + 0.01 * run.seed,
        "margin": 0.25,
        "loss": 1.0 - 0.1 * run.seed,
        "mean_logps": {"chosen": -1.5, "rejected": -1.75},
        "by_length": dict.fromkeys(("chosen_longer", "rejected_longer", "same_length"), group),
        "correlation_with_length": 0.1,
        "answers": answers,
    }
    steps = [0, *range(run.measure_every, run.steps + 1, run.measure_every)]
    return {
        **dataclasses.asdict(run),
        "commit": "c" * 40,
        "versions": {"torch": "2"},
        "seconds": 60,
        "train_pairs": 10,
        "test_pairs": 5,
        "signs_of_collapse": ["step 3: entropy rose"] * run.seed,
        "curves": {"loss": [2.0] * run.steps, "active_fraction": [None] + [0.5] * (run.steps - 1)},
        "measurements": [{"step": step, **measurement} for step in steps],
    } | changes


def test_a_default_that_came_later_leaves_older_records_done():
    run = STUDIES["flips"](0)[1]
    older = {key: value for key, value in record(run).items() if key != "test_length"}
    assert is_done(run, [older])
    assert not is_done(dataclasses.replace(run, test_length=99), [older])


def test_dpo_is_measured_against_its_reference(tmp_path):
    model = Path(save_model(tmp_path / "model"))
    pairs = Path(save_pairs(tmp_path / "all.jsonl"))
    run = dataclasses.replace(
        small(next(run for run in STUDIES["real"](0) if run.arm == "dpo")), answers=0
    )
    start, *_, end = carry_out(run, model, pairs, pairs)["measurements"]
    assert start["margin"] == 0
    assert end["margin"] != 0


def test_some_arms_of_a_study(capsys):
    runs = planned(parse(["real", "--report", "--arms", "simpo", "dpo"]))
    assert [run.arm for run in runs] == ["simpo", "dpo"] * 3
    with pytest.raises(SystemExit):
        parse(["real", "--report", "--arms", "nothing"])
    assert "unknown arms: nothing; known: simpo, lmpo" in capsys.readouterr().err


def test_models_of_the_studies(tmp_path):
    small_one, real_one = (
        model_of(study, parse(["flips", "--report"])) for study in ("flips", "real")
    )
    assert real_one == real_model.FOLDER != small_one
    assert model_of("real", parse(["--report", f"--model={tmp_path}"])) == tmp_path


@pytest.fixture
def place(tmp_path) -> Path:
    tmp_path /= "made"
    for runs in STUDIES.values():
        for seed in (1, 0):
            for run in runs(seed):
                append(tmp_path, record(run))
    return tmp_path


def test_a_run_is_done_once_and_only_as_it_was(place):
    run = STUDIES["flips"](0)[1]
    records = read(place, "flips")
    assert is_done(run, records)
    assert not is_done(dataclasses.replace(run, steps=run.steps + 1), records)
    assert not is_done(dataclasses.replace(run, seed=7), records)


def test_a_line_that_was_cut_is_left_out_and_spoils_no_other(place):
    path = place / "tail.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert len(read(place, "tail")) == len(whole.splitlines()) - 1
    append(place, json.loads(whole.splitlines()[-1]))
    assert len(read(place, "tail")) == len(whole.splitlines())


def test_seeds_are_compared_with_their_own(place):
    arms = by_arm(read(place, "length"))
    assert list(arms) == [run.arm for run in STUDIES["length"](0)]
    assert [a["seed"] for a, b in paired(*list(arms.values())[:2]) if a["seed"] == b["seed"]] == [
        0,
        1,
    ]
    for exact, mean in tail_pairs(read(place, "tail"))["logits x 2"]["mean 2^-11"]:
        assert exact["settings"]["head_tail"] == "exact"
        assert mean["settings"]["head_tail"] == "mean"
        assert exact["sharpen"] == mean["sharpen"] == 2


def test_gaps_are_relative_to_the_exact_run():
    one, other = ({"curves": {"loss": losses}} for losses in ([2.0, 4.0], [2.0, 3.0]))
    assert gaps(one, other) == [0, 1 / 3]
    assert smoothed([float(i) for i in range(12)])[-3:] == [4.5, 5.5, 6.5]
    assert smoothed([2.0, 4.0]) == [2, 3]
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert mean_and_error([1.0]) == (1.0, None)


def test_every_study_has_its_table_and_picture(place, capsys):
    files = write_report(place)
    assert [file.name for file in files] == [f"{study}.png" for study in STUDIES]
    assert all(file.stat().st_size > 10_000 for file in files)
    shown = capsys.readouterr().out
    for study, runs in STUDIES.items():
        table = TABLES[study](read(place, study))
        assert table in shown
        widths = {line.count("|") for line in table.split("\n\n")[0].splitlines()}
        assert len(widths) == 1, "every row has a cell per column"
        assert all(run.arm.partition(", ")[2] in table for run in runs(0))


@pytest.mark.parametrize("study", TABLES)
def test_the_page_shows_the_committed_records(study):
    page = (ROOT / "docs" / "studies.md").read_text()
    records = read(ROOT / "bench" / "results" / "studies", study)
    shown = page.partition(f"<!-- table:study-{study} -->")[2].partition(CLOSE)[0]
    wanted = TABLES[study](records) if records else "Not carried out yet"
    assert wanted in shown, "python -m bench.studies --report renews the page"
    assert (f"results/studies/{study}.png" in page) == bool(records)
