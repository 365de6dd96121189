"""The benchmark of whole training steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from widemargin.trainer.doctor.trl import GLOBAL, seam

from bench.lib import noise
from bench.lib.record import read_rows
from bench.lib.table import write_into
from bench.training import command as training
from bench.training import plot as training_plot
from bench.training import rounds
from bench.training.data import lengths_of
from bench.training.table import table
from bench.training.worker import cpo_row, head_of
from tests.support.tiny_models import TOKENIZER, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    words = ["yes", "no", "maybe", "water", "Paris", "sure", "sorry", "not"]
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for i in range(12):
            sides = {
                "prompt": ("user", words[i % 8] * (1 + i % 3)),
                "chosen": ("assistant", "yes"),
                "rejected": ("assistant", " ".join(words[: 1 + i % 7]) + "."),
            }
            row = {k: [{"role": r, "content": c}] for k, (r, c) in sides.items()}
            file.write(json.dumps(row) + "\n")
    return tmp_path


OUR_HEAD = "trl-dpo-our-head"


def tiny(folder: Path, lengths: list[list[int]], *arguments: str) -> list[str]:
    """Arguments for random weights on pairs of so many tokens, two a step."""
    (folder / "lengths.json").write_text(json.dumps(lengths))
    given = ("--shape", "tiny", "--lengths", str(folder / "lengths.json"))
    return [*given, "--batch", "2", "--allow-dirty", *arguments]


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_layouts_do_the_same_work(folder, capsys):
    out = folder / "out.json"
    status = training.main(
        [
            *("--contenders", "widemargin-padded", "widemargin-prefix_shared"),
            *("--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl")),
            *("--steps", "2", "--warmup", "1", "--batch", "2", "--max-length", "64"),
            *("--out", str(out), "--allow-dirty", "--long-prompts", "--head-tail", "exact"),
            *("--accumulation", "2", "--rounds", "2"),
        ]
    )
    assert status == 0, capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["widemargin-padded", "widemargin-prefix_shared"]
    assert rows[0]["largest_loss_gap"] < 1e-5
    assert [(row["steps"], row["rounds"]) for row in rows] == [(2, 2), (2, 2)]
    for row in rows:
        assert len(row["losses"]) == 3
        assert row["pairs_per_s"] > 0
        assert row["peak_mib"] > row["start_mib"] / 2
    assert rows[1]["tokens_per_step"] < rows[0]["tokens_per_step"]
    page = folder / "page.md"
    page.write_text("before\n<!-- table:training -->\n<!-- /table -->\nafter\n")
    write_into(page, table(rows), "training")
    training_plot.draw(rows, folder / "plot.png")
    assert table(rows) in page.read_text()
    assert page.read_text().endswith("<!-- /table -->\nafter\n")
    assert (folder / "plot.png").stat().st_size > 10_000


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_random_weights_on_lengths_alone(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = tiny(
        *(tmp_path, [[3, 5, 4], [6, 2, 9]]),
        *("--contenders", "widemargin-packed", "--rounds", "1", "--steps", "1", "--warmup", "0"),
        *("--out", str(out), "--checkpointing"),
    )
    assert training.main(arguments) == 0, capsys.readouterr()
    assert training.main([*arguments, "--append"]) == 0
    assert len(read_rows(out)) == 1  # the same case again takes the old row's place
    assert training.main([*arguments, "--append", "--objective", "lmpo"]) == 0
    rows = read_rows(out)
    assert [row["objective"] for row in rows] == ["simpo", "lmpo"]
    assert [row["tokens_per_step"] for row in rows] == [3 + 5 + 3 + 4 + 6 + 2 + 6 + 9] * 2


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_steps_are_fewer_where_time_is_short(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = tiny(
        *(tmp_path, [[3, 5, 4]] * 20),
        *("--contenders", "widemargin-padded", "widemargin-packed", "--rounds", "1"),
        *("--steps", "9", "--warmup", "1", "--budget-s", "0", "--out", str(out)),
    )
    assert training.main(arguments) == 0, capsys.readouterr()
    for row in read_rows(out):
        assert row["steps"] == 2
        assert len(row["losses"]) == 3  # with the one that does not count


@pytest.mark.costly
def test_a_contender_that_cannot_run_is_listed_with_the_reason(folder, capsys):
    """In a fresh process; the other tests' are forks."""
    out = folder / "out.json"
    status = training.main(
        [
            *("--contenders", "widemargin-padded", "--attention", "no_such_attention"),
            *("--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl")),
            *("--steps", "1", "--warmup", "0", "--batch", "2", "--out", str(out), "--allow-dirty"),
        ]
    )
    assert status == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert "no_such_attention" in row["reason"]
    assert "no_such_attention" in capsys.readouterr().out


def test_random_weights_take_real_pairs_with_ids_of_their_vocabulary(folder):
    where = ("--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"))
    size = ("--batch", "4", "--steps", "2", "--warmup", "0", "--max-length", "64")
    real, folded = (
        training.find_rows(training.parse([*where, *size, *shape]))
        for shape in ((), ("--shape", "tiny"))
    )
    assert lengths_of(folded) == lengths_of(real)
    assert max(max(ids) for row in real for ids in row.values()) >= 64
    assert max(max(ids) for row in folded for ids in row.values()) < 64


def test_the_peer_is_given_the_same_tokens():
    row = cpo_row({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]})
    assert row["chosen_input_ids"] == [1, 2, 3, 4]
    assert row["chosen_labels"] == [-100, -100, 3, 4]
    assert row["rejected_input_ids"] == [1, 2, 5]
    assert row["rejected_attention_mask"] == [1, 1, 1]


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_a_noisy_run_is_kept_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(noise, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(noise, "NOISY", tmp_path / "noisy")
    monkeypatch.setattr(noise, "MAX_SPREAD", -1.0)
    arguments = tiny(
        *(tmp_path, [[3, 5, 4]] * 6),
        *("--contenders", "widemargin-padded", "--rounds", "2", "--steps", "2", "--warmup", "1"),
        *("--out", str(tmp_path / "results" / "a.json")),
    )
    assert training.main(arguments) == 1
    assert "repeat it when the machine is idle" in capsys.readouterr().err
    (row,) = read_rows(tmp_path / "noisy" / "a.json")
    assert row["spread"] >= 0
    assert 0 <= row["others_load"] <= 1
    assert not (tmp_path / "results" / "a.json").exists()
    assert training.main([*arguments, "--keep-noisy"]) == 0
    assert (tmp_path / "results" / "a.json").is_file()


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("objective", ["simpo", "dpo"])
def test_an_adapter_trains_in_place_of_all_weights(tmp_path, capsys, objective):
    out = tmp_path / "out.json"
    arguments = tiny(
        *(tmp_path, [[3, 5, 4]] * 4),
        *("--contenders", "widemargin-padded", "--rounds", "1", "--steps", "1", "--warmup", "0"),
        *("--out", str(out), "--objective", objective, "--append"),
    )
    assert training.main([*arguments, "--lora"]) == 0, capsys.readouterr()
    assert training.main(arguments) == 0, capsys.readouterr()
    rows = read_rows(out)
    assert [row["lora"] for row in rows] == [True, False]
    assert "float32, LoRA;" in table(rows)


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_trl_with_our_head_takes_the_same_steps(tmp_path, capsys):
    pytest.importorskip("trl")
    out = tmp_path / "out.json"
    arguments = tiny(
        *(tmp_path, [[3, 5, 4]] * 4),
        *("--contenders", "trl-dpo", OUR_HEAD, "--objective", "dpo"),
        *("--rounds", "1", "--steps", "2", "--warmup", "0", "--out", str(out)),
    )
    assert training.main(arguments) == 0, capsys.readouterr()
    theirs, ours = read_rows(out)
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["losses"] != [ours["losses"][0]] * 2


def test_trl_has_our_head_where_the_contender_says_so(tmp_path):
    pytest.importorskip("trl", minversion="1.16", reason="its head is called in another way")
    options = training.parse(["--shape", "tiny", "--head-tail", "exact"])
    specs = {name: rounds.specification(name, options, tmp_path) for name in ("trl-dpo", OUR_HEAD)}
    assert [spec["our_head"] for spec in specs.values()] == [None, "exact"]
    for name, spec in specs.items():
        with head_of(spec):
            assert hasattr(getattr(seam(), GLOBAL), "replaces") == (name == OUR_HEAD)
    assert not hasattr(getattr(seam(), GLOBAL), "replaces")


def test_contenders_see_the_pairs_of_trees_in_the_same_steps():
    """Ours draws its own order, with and without trees; others take the rows as they come."""
    rows = [
        {"prompt_ids": [i % 4 + 1], "chosen_ids": [9], "rejected_ids": [10 + i]} for i in range(12)
    ]
    order = rounds.batch_order(rows, 6, trees=True)
    steps = [[rows[i] for i in order[begin : begin + 6]] for begin in (0, 6)]
    assert all(len({row["prompt_ids"][0] for row in step}) == 2 for step in steps)
    rearranged = [rows[i] for i in rounds.drawn_alike(rows, 6, 1, order)]
    drawn = [rearranged[i] for i in rounds.batch_order(rearranged, 6)]
    for begin, step in zip((0, 6), steps, strict=True):
        numbers = [
            sorted(r["rejected_ids"][0] for r in s) for s in (drawn[begin : begin + 6], step)
        ]
        assert numbers[0] == numbers[1]


def test_the_faster_time_of_a_step_counts():
    """Of three steps, one that warms up and two that count, in two rounds."""
    options = training.parse(["--steps", "3", "--warmup", "1", "--batch", "4"])
    taken = [[(9000, 7), (2000, 10), (1000, 20)], [(9000, 7), (1500, 10), (1100, 20), (1, 1)]]
    records = [
        {
            "start_mib": 5.0,
            "peak_mib": peak,
            "losses": [0.5, 0.25, 0.125, 0.1],
            "taken": [{"ms": ms, "tokens": tokens} for ms, tokens in steps],
        }
        for peak, steps in zip((8.0, 9.0), taken, strict=True)
    ]
    row = rounds.facts(records, 2, options)
    assert row["pairs_per_s"] == 8 / 2.5
    assert row["spread"] == 0.333
    assert row["tokens_per_step"] == 15
    assert (row["peak_mib"], row["losses"]) == (9.0, [0.5, 0.25, 0.125])
    assert "spread" not in rounds.facts(records[:1], 2, options)
    slow = [records[0] | {"taken": [{"ms": 9e9, "tokens": 1}] * 4}]
    assert rounds.facts(records + slow, 2, options)["spread"] == 0.333


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_contenders_that_break_leave_the_others_their_rounds(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setitem(rounds.CONTENDERS, "trl-cpo", {"trainer": "no such trainer"})
    arguments = tiny(
        *(tmp_path, [[3, 5, 4]] * 6),
        *("--contenders", "widemargin-padded", "trl-cpo", "--rounds", "2"),
        *("--steps", "2", "--warmup", "0", "--out", str(out)),
    )
    assert training.main(arguments) == 0, capsys.readouterr()
    ours, theirs = read_rows(out)
    assert ours["rounds"] == 2
    assert "no such trainer" in theirs["reason"]
