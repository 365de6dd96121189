"""`widemargin plan`, from the command line to its page and its JSON."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.adapters import lora_config, with_adapter
from widemargin.trainer.plan.command import _gib
from widemargin.trainer.plan.estimate import read_settings
from widemargin.trainer.settings.checks import checkpointing_options

from tests.support.estimates import LMPO, PARAMETERS, TINY, settings
from tests.support.tiny_tokenizers import tiny_tokenizer

GIB = 2**30


def plan(*arguments: str, folder: Path | None = None) -> dict[str, Any]:
    """The JSON of a plan."""
    assert folder is not None
    file = folder / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) in (0, 1)
    return json.loads(file.read_text())


@pytest.mark.costly
def test_the_published_run_fits_on_four_gpus(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [LMPO, "--gpus", "4", "--gpu-memory", "80", "--json", str(file)]
    assert main(["plan", *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "It fits" in text
    assert "headroom" in text
    assert "every one as long as max_length allows" in text
    estimate = json.loads(file.read_text())
    parts = {part["name"]: part["bytes"] for part in estimate["memory"]["lasting"]}
    share = PARAMETERS["meta-llama/Meta-Llama-3-8B-Instruct"] / 4
    for name, width in {
        "weights": 2,
        "gradients": 4,
        "fp32 master weights": 4,
        "optimizer states": 8,
        "reduce bucket": 5e8 * 2 / share,
    }.items():
        assert parts[name] == pytest.approx(width * share)
    assert estimate["headroom_bytes"] == pytest.approx(80 * GIB - estimate["memory"]["peak_bytes"])
    assert 20 * GIB < estimate["headroom_bytes"] < 45 * GIB
    whole, less = estimate["activations"]["whole"], estimate["activations"]["checkpointing"]
    assert whole["kept"] > 10 * less["kept"]
    # The inputs of 32 layers of the largest micro-batch, in bfloat16, and little else.
    inputs = estimate["largest_micro_batch"]["length"] * 4096 * 2 * 32
    assert inputs < less["kept"] < 1.5 * inputs
    assert {row["ranks"] for row in estimate["scaling"]} == {4, 8, 16, 64, 256}


@pytest.mark.parametrize("text", ["80", "80.0", "80GB", "80 GiB", "80g", "80Gb", "81920MiB"])
def test_memory_as_people_write_it(text):
    assert _gib(text) == 80


@pytest.mark.parametrize("text", ["", "GB", "80TB", "0", "-1GB", "80 Gbit", "nan"])
def test_memory_that_is_no_size(text):
    with pytest.raises(ArgumentTypeError, match="expected a size in GiB such as 80, 80GB or"):
        _gib(text)


@pytest.mark.costly
@pytest.mark.parametrize("quantized", ["false", "true"])
def test_an_adapter_learns_in_fp32(tmp_path, quantized):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY))
    estimate = plan(
        *(LMPO, "--model-config", str(small), "--gpus", "1", "--engine", "ddp", "--use_peft=true"),
        *("--dtype=bfloat16", "--lora_r=8", f"--load_in_4bit={quantized}"),
        *("--packing=padded", "--attn_implementation=sdpa"),
        folder=tmp_path,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.bfloat16)
    adapted = with_adapter(model, lora_config(settings(use_peft=True, lora_r=8)))
    learns = [weight for weight in adapted.parameters() if weight.requires_grad]
    parts = {part["name"]: part["bytes"] for part in estimate["memory"]["lasting"]}
    assert parts["gradients"] == sum(weight.nbytes for weight in learns)
    assert parts["optimizer states"] == 2 * parts["gradients"]


@pytest.mark.costly
@pytest.mark.skipif("offload" not in checkpointing_options(), reason="older transformers")
def test_which_layers_are_computed_again_and_from_where(tmp_path):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY | {"num_hidden_layers": 12}))

    def activations(kwargs: str) -> tuple[str, str, float, float]:
        estimate = plan(
            *(LMPO, "--model-config", str(small), "--gpus", "2", "--pairs=400"),
            f"--gradient_checkpointing_kwargs={kwargs}",
            folder=tmp_path,
        )
        kept = estimate["memory"]["phases"]["the head"][0]
        return kept["name"], kept["note"], kept["bytes"], estimate["speed"]["flops"]

    each, second = activations("{use_reentrant: false}"), activations("{every_n_layers: 2}")
    assert each[0] == "activations kept, inputs of the layers"
    assert second[0] == "activations kept, all but one layer in 2"
    assert second[2] > 2 * each[2]
    assert second[3] < each[3]
    with pytest.raises(UserError, match="offload: expected true or false, got 'no'"):
        read_settings(LMPO, ["--gradient_checkpointing_kwargs={offload: 'no'}"])
    name, note, size, flops = activations("{offload: true}")
    assert (name, flops) == (each[0], each[3])
    assert "host's memory" in note
    assert "host's memory" not in each[1]
    assert size < each[2]


@pytest.mark.costly
def test_what_to_change_where_it_does_not_fit(tmp_path, capsys):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY | {"num_hidden_layers": 4, "vocab_size": 100_000}))
    estimate = plan(
        *(LMPO, "--model-config", str(small), "--gpus", "2", "--engine", "ddp"),
        *("--gradient_checkpointing=false", "--packing=padded", "--gpu-memory=1.9"),
        "--pairs=6000",
        folder=tmp_path,
    )
    assert not estimate["fits"]
    changes = [step["change"].split(":")[0] for step in estimate["advice"]]
    assert changes[0] == "gradient_checkpointing"
    peaks = [estimate["memory"]["peak_bytes"], *(step["peak"] for step in estimate["advice"])]
    for before, after, step in zip(peaks, peaks[1:], estimate["advice"], strict=False):
        assert step["saves"] == pytest.approx(before - after)
        assert step["saves"] > 0
    text = " ".join(capsys.readouterr().out.split())
    assert "It does not fit" in text
    assert "1. gradient_checkpointing: true: saves" in text


@pytest.mark.costly
def test_micro_batches_are_the_planners(tmp_path):
    means = ("--mean-lengths", "150,600,600", "--pairs", "2000", "--gpus", "4", "--max_length=1024")
    free = plan(LMPO, *means, folder=tmp_path)
    limited = plan(LMPO, *means, "--max_tokens_per_micro_batch=2048", folder=tmp_path)
    assert free["largest_micro_batch"]["length"] > 2048
    assert limited["largest_micro_batch"]["length"] <= 2048
    assert limited["micro_batches"] > free["micro_batches"]
    assert limited["pairs_per_step"] == free["pairs_per_step"] == 128
    assert limited["memory"]["peak_bytes"] <= free["memory"]["peak_bytes"]


@pytest.mark.costly
def test_measured_speed_takes_the_place_of_the_assumed(tmp_path, capsys):
    some = (LMPO, "--gpus", "4", "--pairs", "12800", "--mean-lengths", "150,300,300")
    estimate = plan(*some, "--pairs-per-s", "64", folder=tmp_path)
    assert estimate["speed"]["step_s"] == pytest.approx(2.0)
    assert estimate["speed"]["hours"] == pytest.approx(200 / 3600)
    text = " ".join(capsys.readouterr().out.split())
    assert "reached, recomputation counted (as measured" in text
    assert estimate["scaling"][0]["same_rank"]["compute_s"] == pytest.approx(2.0)
    results = tmp_path / "bench.json"
    row = {"provider": "widemargin-prefix_shared", "pairs_per_s": 16, "case": "x"}
    results.write_text(json.dumps({"rows": [row | {"device_name": "a GPU"}]}))
    again = plan(*some, "--bench", str(results), folder=tmp_path)
    assert again["speed"]["step_s"] == pytest.approx(2.0)


@pytest.mark.costly
def test_lengths_of_data_that_is_here(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | {"vocab_size": 500}))
    rows = [{"prompt": "Is water wet?", "chosen": " yes" * n, "rejected": " no"} for n in (1, 2, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset: {tmp_path / 'pairs.jsonl'}\n"
        "objective: simpo\nper_device_train_batch_size: 3\n"
    )
    estimate = plan(str(config), folder=tmp_path)
    assert "3 pairs of" in estimate["data"]
    assert estimate["layout"] in ("prefix_shared", "packed", "padded")
    assert estimate["fits"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model_name_or_path=nobody/nothing"], "--model-config"),
        (["--model-config", "nowhere"], "no such file"),
        (["--accelerate", "nowhere.yaml"], "nowhere.yaml"),
        (["--mfu", "2"], "--mfu"),
        (["--bench", "nowhere.json"], "--bench"),
        (["--bench", "x", "--pairs-per-s", "1"], "keep one"),
        (["--no_such_setting=1"], "no_such_setting"),
        (["--load_in_4bit=maybe"], "load_in_4bit"),
    ],
)
def test_bad_input_is_one_line(arguments, named, capsys):
    assert main(["plan", LMPO, "--mean-lengths", "9,9,9", "--pairs", "200", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error


@pytest.mark.parametrize(
    "argument", ["--gpus=0", "--gpu-memory=-1", "--mean-lengths=1,2", "--pairs=x"]
)
def test_bad_numbers_are_refused(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", LMPO, argument])
    assert "expected" in capsys.readouterr().err
