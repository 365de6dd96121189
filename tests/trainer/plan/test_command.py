"""`widemargin plan`: what it says of memory, against measurements; the rest against arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.cli import main
from widemargin.trainer.data.lengths import PairLengths
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.adapters import lora_config, with_adapter
from widemargin.trainer.plan.batches import micro_batch
from widemargin.trainer.plan.engines import Engine, read_engine, shipped_engine
from widemargin.trainer.plan.head_memory import backward_extra, bound, forward_extra
from widemargin.trainer.plan.lengths import assumed, at_limits
from widemargin.trainer.plan.settings import read_settings
from widemargin.trainer.plan.shapes import PUBLISHED, find_config, model_size
from widemargin.trainer.plan.simulation import Recipe, simulate
from widemargin.trainer.plan.speed import traffic

from tests.support.measured_memory import PACKINGS, estimated_bytes, measured_bytes, small_config
from tests.support.tiny_tokenizers import tiny_tokenizer

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LMPO = str(CONFIGS / "train" / "lmpo-llama3-8b-instruct.yaml")
GIB = 2**30
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def settings(**given: Any) -> PreferenceConfig:
    return PreferenceConfig(objective="simpo", use_cpu=True, report_to="none", **given)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("layout", list(PACKINGS))
def test_activations_are_those_measured(layout, checkpointing):
    config = small_config()
    estimated = estimated_bytes(config, settings(), layout, checkpointing, bf16=False)
    measured = measured_bytes(config, layout, checkpointing, bf16=False)
    assert estimated == pytest.approx(measured, rel=0.25)


def recipe(config: Any, **changes: Any) -> Recipe:
    given = settings(**changes.pop("settings", {}))
    standard = {"dtype": torch.bfloat16, "autocast": None, "attention": "flash_attention_2"}
    return Recipe(
        **{"config": config, "settings": given, "device": "cuda", "checkpointing": True}
        | standard
        | changes
    )


BATCH = micro_batch(
    PairLengths(np.array([5, 9]), np.array([20, 7]), np.array([3, 30])), PACKINGS["prefix_shared"]
)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_and_four_layers_stand_for_all(autocast):
    """With autocast over fp32 weights, the forward's copies of weights grow and the rest does not:
    each part has to be extrapolated by itself."""
    config = AutoConfig.for_model(**TINY)
    wanted = recipe(config, dtype=torch.float32, autocast=autocast)
    whole = simulate(wanted, BATCH, layers=6)
    assert simulate(wanted, BATCH) == whole
    assert whole.peak >= whole.kept


def test_checkpointing_and_a_shared_prompt_hold_less():
    config = AutoConfig.for_model(**TINY)
    lengths = PairLengths(np.array([500]), np.array([40]), np.array([60]))
    shared, padded = (micro_batch(lengths, PACKINGS[name]) for name in ("prefix_shared", "padded"))
    assert shared.tokens == 600
    assert padded.tokens == 1120
    whole = recipe(config, checkpointing=False)
    assert simulate(recipe(config), shared).kept < simulate(whole, shared).kept / 4
    assert simulate(whole, shared).kept < simulate(whole, padded).kept


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dense_masks_cost_their_area(attention):
    config = AutoConfig.for_model(**TINY)
    lengths = PairLengths(np.array([500]), np.array([40]), np.array([60]))
    fused = simulate(recipe(config, checkpointing=False), micro_batch(lengths, PACKINGS["padded"]))
    dense = simulate(
        recipe(config, checkpointing=False, attention=attention),
        micro_batch(lengths, PACKINGS["padded"]),
    )
    assert dense.kept > fused.kept + 2 * 560 * 560  # at least a byte for each entry of both masks


def test_an_adapter_needs_no_gradient_of_the_head():
    config = AutoConfig.for_model(**TINY | {"vocab_size": 50_000})
    full = simulate(recipe(config), BATCH)
    lora = simulate(recipe(config, settings={"use_peft": True}), BATCH)
    assert full.head - lora.head == pytest.approx(50_000 * 32 * 2, rel=0.05)


def test_a_model_that_cannot_run_without_data_is_an_error(monkeypatch):
    from widemargin.trainer.plan import simulation

    monkeypatch.setattr(simulation, "masks_for", lambda *_: torch.ones(3).item())
    with pytest.raises(UserError, match="llama: its memory cannot be told"):
        simulate(recipe(AutoConfig.for_model(**TINY)), BATCH)


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 300), (8190, 128256), (100_000, 256_000)])
def test_the_heads_memory_is_within_its_bound(tokens, vocab):
    blocks = -(-vocab // 128)
    kept = tokens * blocks * 4
    most = bound(tokens, 4096, vocab)
    assert kept + backward_extra(tokens, 4096, vocab, 2, "triton") <= most
    assert forward_extra(tokens, 4096, vocab, 2, "triton") <= tokens * vocab * 4


PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "google/gemma-2-9b-it": 9_241_705_984,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shipped_shapes_have_the_published_counts(name):
    given = settings(model_name_or_path=name)
    size = model_size(find_config(given, None)[0], given)
    assert size.total == size.trainable == PARAMETERS[name]
    assert size.tied == (name == "google/gemma-2-9b-it")


def test_every_shipped_config_has_a_shape():
    for path in (CONFIGS / "train").glob("*.yaml"):
        name = read_settings(str(path)).model_name_or_path
        assert name in PUBLISHED or path.stem == "quickstart"


def plan(*arguments: str, folder: Path | None = None) -> dict[str, Any]:
    """The JSON of a plan."""
    assert folder is not None
    file = folder / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) in (0, 1)
    return json.loads(file.read_text())


def test_the_published_run_fits_on_four_gpus(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [LMPO, "--gpus", "4", "--gpu-memory", "80", "--json", str(file)]
    assert main(["plan", *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "It fits" in text
    assert "headroom" in text
    assert "every one as long as max_length allows" in text
    found = json.loads(file.read_text())
    parts = {part["name"]: part["bytes"] for part in found["memory"]["lasting"]}
    share = PARAMETERS["meta-llama/Meta-Llama-3-8B-Instruct"] / 4
    for name, width in {
        "weights": 2,
        "gradients": 4,
        "fp32 master weights": 4,
        "optimizer states": 8,
        "reduce bucket": 5e8 * 2 / share,
    }.items():
        assert parts[name] == pytest.approx(width * share)
    assert found["headroom_bytes"] == pytest.approx(80 * GIB - found["memory"]["peak_bytes"])
    assert 20 * GIB < found["headroom_bytes"] < 45 * GIB
    whole, less = found["activations"]["whole"], found["activations"]["checkpointing"]
    assert whole["kept"] > 10 * less["kept"]
    # The inputs of 32 layers of the largest micro-batch, in bfloat16, and little else.
    inputs = found["largest_micro_batch"]["length"] * 4096 * 2 * 32
    assert inputs < less["kept"] < 1.5 * inputs
    assert {row["ranks"] for row in found["scaling"]} == {4, 8, 16, 64, 256}


@pytest.mark.parametrize("quantized", ["false", "true"])
def test_an_adapter_learns_in_fp32(tmp_path, quantized):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY))
    found = plan(
        *(LMPO, "--model-config", str(small), "--gpus", "1", "--engine", "ddp", "--use_peft=true"),
        *("--dtype=bfloat16", "--lora_r=8", f"--load_in_4bit={quantized}"),
        *("--packing=padded", "--attn_implementation=sdpa"),
        folder=tmp_path,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.bfloat16)
    adapted = with_adapter(model, lora_config(settings(use_peft=True, lora_r=8)))
    learns = [weight for weight in adapted.parameters() if weight.requires_grad]
    parts = {part["name"]: part["bytes"] for part in found["memory"]["lasting"]}
    assert parts["gradients"] == sum(weight.nbytes for weight in learns)
    assert parts["optimizer states"] == 2 * parts["gradients"]


def test_what_to_change_where_it_does_not_fit(tmp_path, capsys):
    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY | {"num_hidden_layers": 4, "vocab_size": 100_000}))
    found = plan(
        *(LMPO, "--model-config", str(small), "--gpus", "2", "--engine", "ddp"),
        *("--gradient_checkpointing=false", "--packing=padded", "--gpu-memory", "1.9"),
        folder=tmp_path,
    )
    assert not found["fits"]
    changes = [step["change"].split(":")[0] for step in found["advice"]]
    assert changes[0] == "gradient_checkpointing"
    peaks = [found["memory"]["peak_bytes"], *(step["peak"] for step in found["advice"])]
    for before, after, step in zip(peaks, peaks[1:], found["advice"], strict=False):
        assert step["saves"] == pytest.approx(before - after)
        assert step["saves"] > 0
    text = " ".join(capsys.readouterr().out.split())
    assert "It does not fit" in text
    assert "1. gradient_checkpointing: true: saves" in text


def test_micro_batches_are_the_planners(tmp_path):
    means = ("--mean-lengths", "150,600,600", "--pairs", "2000", "--gpus", "4", "--max_length=1024")
    free = plan(LMPO, *means, folder=tmp_path)
    limited = plan(LMPO, *means, "--max_tokens_per_micro_batch=2048", folder=tmp_path)
    assert free["largest_micro_batch"]["length"] > 2048
    assert limited["largest_micro_batch"]["length"] <= 2048
    assert limited["micro_batches"] > free["micro_batches"]
    assert limited["pairs_per_step"] == free["pairs_per_step"] == 128
    assert limited["memory"]["peak_bytes"] <= free["memory"]["peak_bytes"]


def test_measured_speed_takes_the_place_of_the_assumed(tmp_path, capsys):
    some = (LMPO, "--gpus", "4", "--pairs", "12800", "--mean-lengths", "150,300,300")
    found = plan(*some, "--pairs-per-s", "64", folder=tmp_path)
    assert found["speed"]["step_s"] == pytest.approx(2.0)
    assert found["speed"]["hours"] == pytest.approx(200 / 3600)
    text = " ".join(capsys.readouterr().out.split())
    assert "reached, recomputation counted (as measured" in text
    assert found["scaling"][0]["same_rank"]["compute_s"] == pytest.approx(2.0)
    results = tmp_path / "bench.json"
    row = {"provider": "widemargin-prefix_shared", "pairs_per_s": 16, "case": "x"}
    results.write_text(json.dumps({"rows": [row | {"device_name": "a GPU"}]}))
    again = plan(*some, "--bench", str(results), folder=tmp_path)
    assert again["speed"]["step_s"] == pytest.approx(2.0)


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
    found = plan(str(config), folder=tmp_path)
    assert "3 pairs of" in found["data"]
    assert found["layout"] in ("prefix_shared", "packed", "padded")
    assert found["fits"]


def test_assumed_lengths_keep_to_the_limits():
    given = settings(max_length=512, max_prompt_length=100)
    lengths = assumed(given, (90.0, 200.0, 210.0), 20_000)
    longest = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    assert longest.max() <= 512
    assert lengths.prompt.max() == 100
    assert lengths.chosen.mean() == pytest.approx(200, rel=0.1)
    assert np.corrcoef(lengths.chosen, lengths.rejected)[0, 1] == pytest.approx(0.5, abs=0.1)
    most = at_limits(given, 1)
    assert (most.prompt + most.chosen).tolist() == [512]
    with pytest.raises(UserError, match="max_length"):
        at_limits(settings(max_length=None), 1)


def test_engines_as_shipped():
    zero3, zero2, fsdp2, ddp = (shipped_engine(n, 64) for n in ("zero3", "zero2", "fsdp2", "ddp"))
    assert (zero3.name, zero3.gradients_fp32, zero3.processes) == ("zero3", True, 4)
    assert (zero2.name, zero2.gradients_fp32, zero2.overlap) == ("zero2", True, True)
    assert (fsdp2.name, ddp.name) == ("fsdp2", "ddp")


def test_deepspeeds_own_settings_are_read(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": "auto",
                    "sub_group_size": 1e7,
                    "offload_optimizer": {"device": "cpu"},
                }
            }
        )
    )
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    )
    engine = read_engine(file, 64)
    assert engine.reduce_bucket == 64 * 64
    assert engine.sub_group == 10_000_000
    assert engine.optimizer_on_cpu
    assert not engine.gradients_fp32


def test_bytes_sent_per_step():
    given = settings()
    size = model_size(AutoConfig.for_model(**TINY), given)
    weights = size.total * 2
    assert traffic(size, Engine("zero3"), 1, 2, 4) == 0
    assert traffic(size, Engine("zero3"), 2, 2, 4) == pytest.approx(0.5 * 4 * 3 * weights)
    assert traffic(size, Engine("zero2"), 2, 2, 4) == pytest.approx(0.5 * 5 * weights)
    assert traffic(size, Engine("ddp"), 2, 2, 4) == pytest.approx(0.5 * 2 * size.total * 4)


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
