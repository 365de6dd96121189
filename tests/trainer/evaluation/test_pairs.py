"""`evaluate pairs`: log-probs against plain logits, the measures, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from widemargin.trainer.cli import main
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.data.table import PairLengths, PairRows
from widemargin.trainer.evaluation.pair_metrics import (
    PairLogps,
    calibration,
    measure,
    reward_metrics,
)
from widemargin.trainer.evaluation.pairs import pair_batches, score_pairs
from widemargin.trainer.evaluation.settings import BETAS, PairSettings, pair_settings
from widemargin.trainer.model.head import patch_head

from tests.support.eval_files import save_model, save_pairs
from tests.support.tiny_images import (
    image_model,
    image_pairs,
    image_processor,
    image_rows,
    own_logps,
)
from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs
from tests.trainer.test_cli import assert_one_line_error


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_model(folder / "model")
    save_model(folder / "other", seed=1)
    save_pairs(folder / "pairs.jsonl")
    return folder


def run(place: Path, out: Path, *arguments: str) -> dict[str, Any]:
    command = ["evaluate", "pairs", "--model", str(place / "model"), "--out", str(out)]
    if not any(a.startswith(("--dataset", "--config")) for a in arguments):
        command += ["--dataset", str(place / "pairs.jsonl")]
    assert main([*command, *arguments]) == 0
    return json.loads((out / "pairs.json").read_text())


def plain_logps(model: Any, row: dict[str, Any], side: str) -> float:
    prompt, answer = list(row["prompt_ids"]), list(row[f"{side}_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logps.gather(1, torch.tensor(answer)[:, None]).sum())


def test_images_are_seen(tmp_path):
    image_model("llava").save_pretrained(tmp_path / "model")
    image_processor("llava").save_pretrained(tmp_path / "model")
    image_pairs().to_parquet(tmp_path / "pairs.parquet")
    run(tmp_path, tmp_path, "--dataset", str(tmp_path / "pairs.parquet"), "--max-length=128")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    model, processor = image_model("llava").eval(), image_processor("llava")
    for raw, row in zip(image_rows(), rows, strict=True):
        for side in ("chosen", "rejected"):
            begin = row["prompt_tokens"]
            _, logps = own_logps(model, processor, raw, side)
            found = logps[begin - 1 : begin + row[f"{side}_tokens"] - 1].sum().item()
            assert row[f"{side}_sum_logps"] == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 150, 100_000])
def test_logps_are_those_of_the_logits_in_any_batches(packing, max_tokens):
    model = tiny_model()
    rows = PairRows(tokenize_pairs(tiny_pairs(7), TOKENIZER, training=False)[0])
    settings = PairSettings(packing=packing, max_tokens_per_batch=max_tokens, device="cpu")
    found = score_pairs(model, rows, settings, TOKENIZER.pad_token_id)
    for side, values in (("chosen", found.chosen), ("rejected", found.rejected)):
        expected = [plain_logps(model, rows[i], side) for i in range(len(rows))]
        np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_a_head_that_is_trained_keeps_its_settings():
    model = tiny_model()
    scoring = patch_head(model, tail="exact")
    rows = PairRows(tokenize_pairs(tiny_pairs(2), TOKENIZER)[0])
    score_pairs(model, rows, PairSettings(packing="padded"), TOKENIZER.pad_token_id)
    head: Any = model.get_output_embeddings()
    assert head.scoring is scoring


def test_batches_hold_every_pair_once_the_longest_first():
    rng = np.random.default_rng(0)
    lengths = PairLengths(*rng.integers(1, 50, (3, 40)))
    batches = list(pair_batches(lengths, 200))
    order = [pair for batch in batches for pair in batch]
    assert sorted(order) == list(range(40))
    widths = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    assert (np.diff(widths[order]) <= 0).all()
    assert all(len(b) == 1 or 2 * len(b) * widths[b].max() <= 200 for b in batches)


def test_measures_by_hand():
    lengths = PairLengths(np.array([3, 3, 3, 3]), np.array([2, 4, 2, 5]), np.array([4, 2, 2, 5]))
    logps = PairLogps(np.array([-2.0, -8.0, -2.0, -5.0]), np.array([-8.0, -2.0, -2.0, -10.0]))
    reference = PairLogps(np.array([-3.0, -3.0, -2.0, -1.0]), np.array([-8.0, -2.0, -2.0, -1.0]))
    result = measure(logps, lengths, reference, BETAS)
    means, sums = result["rewards"]["mean_logps"], result["rewards"]["sum_logps"]
    # margins of means: 1, -1, 0, 1; of sums: 6, -6, 0, 5; against the reference: 1, -5, 0, 5
    assert means["accuracy"] == sums["accuracy"] == 0.5
    assert means["ties"] == 1
    assert means["margin"]["mean"] == pytest.approx(0.25)
    assert sums["margin"]["quantiles"]["0.5"] == pytest.approx(2.5)
    assert result["rewards"]["against_reference"]["margin"]["mean"] == pytest.approx(0.25)
    by_length = means["by_length"]
    assert by_length["chosen_longer"] == {"pairs": 1, "accuracy": 0.0, "margin": -1.0}
    assert by_length["rejected_longer"] == {"pairs": 1, "accuracy": 1.0, "margin": 1.0}
    assert by_length["same_length"] == {"pairs": 2, "accuracy": 0.5, "margin": 0.5}
    assert result["chosen_longer"] == 0.25
    assert result["mean_logps"] == {"chosen": pytest.approx(-1.25), "rejected": -1.5}
    assert means["accuracy_standard_error"] == pytest.approx(0.25)
    assert means["correlation_with_length"] == pytest.approx(-4 / math.sqrt(8 * 2.75))


def test_calibration_of_a_calibrated_reward():
    rng = np.random.default_rng(1)
    size, beta = 200_000, 2.0
    distance = rng.exponential(1.0, size)
    right = rng.random(size) < 1 / (1 + np.exp(-beta * distance))
    margins = np.where(right, distance, -distance)
    good = calibration(margins, beta)
    assert good["ece"] < 0.01
    assert calibration(margins, 4 * beta)["ece"] > 0.03
    assert sum(b["pairs"] for b in good["bins"]) == size
    filled = [b for b in good["bins"] if b["pairs"]]
    assert all(b["from"] <= b["probability"] <= b["to"] for b in filled)
    expected = np.mean(np.logaddexp(0, -beta * margins))
    assert good["log_loss"] == pytest.approx(expected)


def test_extreme_and_no_margins():
    extreme = reward_metrics(np.array([1e5, -1e5, 0.0]), np.array([1, 1, 1]), 1.0)
    assert extreme["by_length"]["same_length"]["accuracy"] is None
    assert extreme["correlation_with_length"] is None
    assert extreme["calibration"]["bins"][-1]["accuracy"] == 0.5
    assert extreme["calibration"]["bins"][0]["accuracy"] == 0.5  # the tie
    assert math.isfinite(extreme["calibration"]["log_loss"])


def test_command_with_a_reference(place, tmp_path, capsys):
    result = run(place, tmp_path, "--reference", str(place / "other"))
    assert result["pairs"] == 9
    assert set(result["rewards"]) == {"mean_logps", "sum_logps", "against_reference"}
    rows = [json.loads(row) for row in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in rows] == list(range(9))
    model = AutoModelForCausalLM.from_pretrained(place / "other").eval()
    tokens, _ = tokenize_pairs(tiny_pairs(9), TOKENIZER, training=False)
    assert rows[4]["reference_chosen_logps"] == pytest.approx(
        plain_logps(model, tokens[4], "chosen"), rel=1e-4
    )
    margin = rows[2]["chosen_sum_logps"] - rows[2]["rejected_sum_logps"]
    assert rows[2]["margin_sum_logps"] == pytest.approx(margin)
    accuracy = np.mean([row["margin_mean_logps"] > 0 for row in rows])
    assert result["rewards"]["mean_logps"]["accuracy"] == pytest.approx(accuracy)
    printed = capsys.readouterr().out
    assert "against reference" in printed
    assert "chosen longer" in printed


def test_a_reference_equal_to_the_model_gives_no_margin(place, tmp_path):
    result = run(place, tmp_path, "--reference", str(place / "model"))
    reward = result["rewards"]["against_reference"]
    assert reward["ties"] == 9
    assert reward["calibration"]["log_loss"] == pytest.approx(math.log(2))


@pytest.mark.costly
def test_same_numbers_again_and_in_other_batches(place, tmp_path):
    first = run(place, tmp_path / "a")
    again = run(place, tmp_path / "b", "--max_tokens_per_batch=60", "--packing=padded")
    assert run(place, tmp_path / "c") == first
    for side in ("chosen", "rejected"):
        assert again["sum_logps"][side] == pytest.approx(first["sum_logps"][side], rel=1e-5)
    fewer = run(place, tmp_path / "d", "--max-pairs", "4", "--dtype=bfloat16")
    assert fewer["pairs"] == 4
    assert fewer["dtype"] == "bfloat16"


def write_config(path: Path, data: Path, **changes: Any) -> str:
    settings = {
        "model_name_or_path": "elsewhere",
        "dataset": str(data),
        "objective": "simpo",
        "beta": 7,
        "max_length": 12,
        "flip": 0.5,
        "bf16": True,
        "attn_implementation": "flash_attention_2",
    } | changes
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not ...}))
    return str(path)


def test_data_settings_of_a_training_config(place, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny_pairs(8).to_json(folder / "train.jsonl")
    tiny_pairs(3, seed=1).to_json(folder / "test.jsonl")
    config = write_config(tmp_path / "c.yaml", folder)
    result = run(place, tmp_path / "a", "--config", config)
    assert result["pairs"] == 3  # the evaluation split
    assert result["rewards"]["mean_logps"]["beta"] == 7
    assert result["rewards"]["sum_logps"]["beta"] == BETAS["sum_logps"]
    assert result["tokens"]["prompt"] + result["tokens"]["rejected"] <= 12
    trained = run(place, tmp_path / "b", "--config", config, "--split", "train", "--beta=3")
    assert trained["pairs"] == 8  # never flipped
    assert trained["data"]["evaluation"]["flipped"] == 0
    assert trained["rewards"]["sum_logps"]["beta"] == 3


@pytest.mark.parametrize(
    ("given", "kind", "beta"),
    [
        ({"objective": "dpo", "beta": 0.01}, "against_reference", 0.01),
        ({"objective": "cpo", "beta": ...}, "sum_logps", 0.1),
        ({"objective": {"cpo-ipo": 1, "sft": 0.5}, "beta": 3}, "mean_logps", 3),
        ({"objective": {"dpo": 0.8, "sft": 1}, "beta": ...}, "against_reference", 0.1),
        ({"objective": "lmpo", "beta": ..., "objective_args": {"beta": 9}}, "mean_logps", 9),
        ({"objective": ..., "loss_type": "sigmoid", "beta": 2.5}, "mean_logps", 2.5),
        ({"objective": ..., "trainer_type": "dpo", "loss_type": "sigmoid"}, "against_reference", 7),
    ],
)
def test_beta_counts_for_the_reward_of_the_objective(tmp_path, given, kind, beta):
    _, betas = pair_settings(write_config(tmp_path / "c.yaml", tmp_path, **given), None, None, [])
    assert betas == BETAS | {kind: beta}


def test_the_data_given_win_over_the_config(tmp_path):
    config = write_config(
        tmp_path / "c.yaml", tmp_path, dataset=..., eval_dataset="x", dataset_mixer={"y": 1.0}
    )
    settings, _ = pair_settings(config, "z.jsonl", None, [])
    assert (settings.dataset, settings.dataset_mixer, settings.eval_dataset) == (
        "z.jsonl",
        {},
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max_lenght=3"], "max_length"),
        (["--beta=0"], "beta"),
        (["--packing=tight"], "packing"),
        (["--dtype=int8"], "dtype"),
        (["--device=tpu9"], "device"),
        (["--max-pairs", "0"], "--max-pairs"),
        (["--max_tokens_per_batch=0"], "max_tokens_per_batch"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
        (["--split", "test"], "--split: leave it out"),
        (["--reference", "/no/such"], "/no/such"),
        (["--out", "/proc/here"], "--out"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_arguments(place, tmp_path, capsys, arguments, named):
    command = ["evaluate", "pairs", "--model", str(place / "model")]
    command += ["--dataset", str(place / "pairs.jsonl"), "--out", str(tmp_path)]
    assert_one_line_error([*command, *arguments], named, capsys)


def test_what_cannot_be_evaluated(place, tmp_path, capsys):
    assert_one_line_error(["evaluate", "pairs"], "--model", capsys)
    (tmp_path / "adapter_config.json").write_text("{}")
    TOKENIZER.save_pretrained(tmp_path)
    command = ["evaluate", "pairs", "--dataset", str(place / "pairs.jsonl"), "--model"]
    assert_one_line_error([*command, str(tmp_path)], "config.json", capsys)
    save_model(tmp_path / "wide", vocab_size=500)
    reference = ["--reference", str(tmp_path / "wide"), "--out", str(tmp_path)]
    assert_one_line_error([*command, str(place / "model"), *reference], "vocabulary", capsys)
    config = write_config(tmp_path / "c.yaml", place, max_lenght=3)
    assert_one_line_error([*command, str(place / "model"), "--config", config], "max_len", capsys)


def test_single_answers_are_refused(place, tmp_path, capsys):
    row = {"prompt": "a", "completion": " b", "label": True}
    (tmp_path / "single.jsonl").write_text(json.dumps(row) + "\n")
    command = ["evaluate", "pairs", "--model", str(place / "model"), "--out", str(tmp_path / "o")]
    assert main([*command, "--dataset", str(tmp_path / "single.jsonl")]) != 0
    assert "dataset: give pairs (prompt, chosen, rejected)" in capsys.readouterr().err
