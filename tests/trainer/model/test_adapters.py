"""LoRA and QLoRA: from settings to a trained adapter, a merged model, and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.models import fingerprint
from widemargin.trainer.evaluation.settings import AnswerSettings
from widemargin.trainer.model.adapters import (
    learnable_line,
    lora_config,
    quantization_config,
    with_adapter,
)
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.model.loading import load_model
from widemargin.trainer.settings import checks
from widemargin.trainer.settings import model as adapter
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config
from widemargin.trainer.train import train

from tests.support.tiny_images import image_model
from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)

LORA = {"use_peft": True, "lora_dropout": 0.0, "learning_rate": 0.5}
CHECKPOINTING = {"gradient_checkpointing": True}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a tiny model, its tokenizer, data and a config."""
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(12).to_json(tmp_path / "train.jsonl")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "objective": "simpo",
        "use_peft": True,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "write_report": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


def test_train_and_merge(place, capsys):
    changes = ["--merge_adapter=true", "--gradient_checkpointing=true", "--lora_r=4"]
    assert main(["train", str(place / "config.yaml"), *changes]) == 0
    printed = capsys.readouterr().out
    assert printed.count("parameters learn") == 1
    assert not (place / "run" / "model.safetensors").exists()
    adapted = AutoPeftModelForCausalLM.from_pretrained(place / "run")
    merged = AutoModelForCausalLM.from_pretrained(place / "run" / "merged")
    assert not hasattr(merged, "peft_config")
    expected, found = logits_of(adapted), logits_of(merged)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits_of(tiny_model())).abs().max() > 1e-2
    ids = AutoTokenizer.from_pretrained(place / "run" / "merged")("yes no")["input_ids"]
    assert ids == TOKENIZER("yes no")["input_ids"]


def test_a_saved_adapter_goes_on_by_the_command_line_and_is_merged(place, capsys):
    start = ["train", str(place / "config.yaml"), "--max_steps=1"]
    assert main(start) == 0
    start += [f"--model_name_or_path={place / 'run'}", f"--output_dir={place / 'next'}"]
    assert main(start) == 2
    assert "error: use_peft: leave it out" in capsys.readouterr().err
    assert main([*start, "--use_peft=false", "--merge_adapter=true", "--lora_r=16"]) == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(place / "next")
    merged = AutoModelForCausalLM.from_pretrained(place / "next" / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_is_merged_and_evaluated_on_its_base(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    relative = ["--model_name_or_path=model", "--merge_adapter=true"]
    assert main(["train", "config.yaml", *relative]) == 0
    monkeypatch.chdir("/")
    run, scores = place / "run", []
    assert main(["merge", str(run), f"--out={place / 'later'}", "--dtype=float32"]) == 0
    for name in ("run", "later", "run/merged"):
        data = [f"--dataset={place / 'train.jsonl'}", "--max_length=64", "--max_prompt_length=32"]
        out = place / "scores" / name
        assert main(["evaluate", "pairs", f"--model={place / name}", f"--out={out}", *data]) == 0
        scores.append(json.loads((out / "pairs.json").read_text())["mean_logps"]["chosen"])
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)
    plain = place / "model"
    capsys.readouterr()
    assert main(["merge", str(plain)]) == 2
    assert "expected an adapter's folder" in capsys.readouterr().err
    assert main(["merge", str(place / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    settings = AnswerSettings(device="cpu")
    assert fingerprint(settings, str(run)) != fingerprint(settings, str(plain))
    before = fingerprint(settings, str(run))
    tiny_model(seed=9).save_pretrained(plain)
    assert fingerprint(settings, str(run)) != before
    (run / "adapter_config.json").write_text("{}")
    assert main(["merge", str(run)]) == 2
    assert "write base_model_name_or_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "checkpointing",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"offload": True}, {"every_n_layers": 2}],
    ids=str,
)
def test_checkpointing_changes_nothing(tmp_path, checkpointing):
    takes = inspect.signature(
        getattr(PreTrainedModel, "activation_checkpointing_enable", lambda: None)
    ).parameters
    if not takes.keys() & checkpointing.keys() and "use_reentrant" not in checkpointing:
        pytest.skip("transformers before it took every_n_layers and offload")
    if "offload" in checkpointing and not torch.accelerator.is_available():
        with pytest.raises(UserError, match="leave offload out here"):
            tiny_config(
                tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing
            )
        return
    learnt = []
    for settings in ({}, CHECKPOINTING | {"gradient_checkpointing_kwargs": checkpointing}):
        trainer = tiny_trainer(tmp_path, **LORA, **settings)
        trainer.train()
        learnt.append(parameters_of(trainer.model))
    torch.testing.assert_close(*learnt)
    fresh = parameters_of(tiny_trainer(tmp_path, **LORA).model)
    assert (learnt[0] - fresh).abs().max() > 1e-3


@pytest.mark.filterwarnings("error::FutureWarning")
def test_no_warning_of_names_between_libraries():
    with_adapter(tiny_model(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            {"lora_target_modules": ["q_proj", "gate_up_proj", "c_attn"]},
            "lora_target_modules: correct c_attn, gate_up_proj, or leave it out",
        ),
        ({"lora_modules_to_save": ["norm", "wte"]}, "lora_modules_to_save: correct wte, or"),
        ({"lora_target_modules": ["q_proj", "layers.1.mlp.up_proj"]}, None),
        ({"lora_target_modules": ".*q_proj|nothing"}, None),
        ({"lora_modules_to_save": ["layernorm", "embed_tokens"]}, None),
        ({}, None),
    ],
)
def test_modules_of_another_family_are_said(tmp_path, caplog, given, missing):
    tiny_trainer(tmp_path, **LORA, **given)
    assert ("the model has no such module" in caplog.text) == (missing is not None)
    assert missing is None or missing in caplog.text


def test_modules_that_the_tower_alone_has_are_not_missing(caplog):
    """peft counts them to "all-linear" too, and then leaves the tower out."""
    model = image_model("llava")
    patch_head(model)
    adapted = with_adapter(model, LoraConfig(target_modules="all-linear", r=2))
    assert "fc1" in adapted.active_peft_config.target_modules
    assert not caplog.text


def test_only_the_adapter_learns_and_every_linear_layer_has_one(tmp_path):
    trainer = tiny_trainer(tmp_path, **LORA)
    learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    assert all("lora_" in name for name in learning)
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    line = f"{count:,} of {total:,} parameters learn ({count / total:.2%})"
    assert learnable_line(trainer.model) == line
    assert trainer.notes() == [line]


def test_the_seed_decides_the_adapters_first_weights(tmp_path):
    fresh = []
    for seed in (1, 1, 2):
        torch.manual_seed(99 + len(fresh))
        fresh.append(parameters_of(tiny_trainer(tmp_path, tiny_model(), **LORA, seed=seed).model))
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])


def test_settings_become_peft_s():
    settings = PreferenceConfig(
        use_peft=True, lora_r=4, lora_alpha=9, lora_dropout=0.1, lora_target_modules=["q_proj"],
        lora_modules_to_save=["norm"], use_cpu=True,
    )  # fmt: skip
    config = lora_config(settings)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 9, 0.1)
    assert (config.target_modules, config.modules_to_save) == ({"q_proj"}, ["norm"])
    assert lora_config(PreferenceConfig(use_cpu=True)) is None


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    common = {
        "use_peft": True, "lora_dropout": 0.3, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "objective": "lmpo",
        "lora_modules_to_save": ["norm"],
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **common)
    whole.train()
    again = tiny_trainer(tmp_path / "again", **common)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters_of(again.model), parameters_of(whole.model))
    assert not torch.equal(
        parameters_of(whole.model), parameters_of(tiny_trainer(tmp_path, **common).model)
    )


def test_an_fp32_adapter_over_a_bf16_model(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model().bfloat16(), **LORA, bf16=True)
    trainer.train()
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


REFUSED = [
    pytest.param({"target_modules": ["lm_head"]}, {}, "lm_head", id="head"),
    pytest.param({"modules_to_save": ["lm_head"]}, {}, "lm_head", id="head saved"),
    pytest.param({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True},
                 "tie_word_embeddings", id="tied embedding saved"),
    pytest.param({"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True},
                 "tie_word_embeddings", id="tied embedding"),
    pytest.param({"trainable_token_indices": [3]}, {"tie_word_embeddings": True},
                 "and trainable_token_indices", id="some tokens of a tied embedding"),
    pytest.param({"target_modules": ["no_such_layer"]}, {}, "no_such_layer", id="unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "model", "message"), REFUSED)
def test_refused_with_advice(config, model, message):
    whole = tiny_model(**model)
    patch_head(whole)
    with pytest.raises(UserError, match=message):
        with_adapter(whole, LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | config))


def test_an_untied_embedding_may_train():
    model = tiny_model()
    patch_head(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2)
    names = [n for n, p in with_adapter(model, config).named_parameters() if p.requires_grad]
    assert any("embed_tokens" in name for name in names)


def test_prompt_tuning_is_refused():
    model = tiny_model()
    patch_head(model)
    with pytest.raises(UserError, match="virtual tokens"):
        with_adapter(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


BAD = [
    pytest.param({"lora_r": 0}, "lora_r", id="rank zero"),
    pytest.param({"lora_alpha": 0}, "lora_alpha", id="alpha zero"),
    pytest.param({"lora_dropout": 1.0}, "lora_dropout", id="dropout one"),
    pytest.param({"bnb_4bit_quant_type": "int4"}, "nf4, fp4", id="quant type"),
    pytest.param({"load_in_4bit": True, "load_in_8bit": True}, "keep one", id="4 and 8"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        PreferenceConfig(**{"use_peft": True, "use_cpu": True} | settings)


@pytest.mark.parametrize("name", ["merge_adapter", "load_in_4bit", "load_in_8bit"])
def test_what_needs_an_adapter_is_refused_without_one(monkeypatch, tmp_path, name):
    monkeypatch.setattr(adapter, "find_spec", lambda package: object())
    with pytest.raises(UserError, match=f"^{name}: .*use_peft: true"):
        train(build_config({"objective": "simpo", "use_cpu": True, name: True}))
    with pytest.raises(UserError, match=f"^{name}: .*peft_config"):
        tiny_trainer(tmp_path, **{name: True})


def test_an_adapter_given_in_python_is_merged_on_saving(tmp_path):
    changed = tiny_model(seed=5)  # an object, whose weights are in no file
    settings = tiny_config(tmp_path, merge_adapter=True, learning_rate=0.5)
    own = LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    trainer = PreferenceTrainer(
        changed, settings, tiny_pairs(), processing_class=TOKENIZER, peft_config=own
    )
    trainer.train()
    trainer.save_model()
    expected = logits_of(trainer.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(tiny_model(seed=5))).abs().max() > 1e-2
    assert any("lora" in name for name, _ in trainer.model.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("yes")["input_ids"]


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes_that_is_not_installed(monkeypatch, name):
    monkeypatch.setattr(adapter, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"{name}.*not installed.*widemargin\[qlora\]"):
        PreferenceConfig(use_peft=True, use_cpu=True, **{name: True})


def test_quantization_as_the_settings_say(monkeypatch):
    monkeypatch.setattr(adapter, "find_spec", lambda package: object())
    settings = PreferenceConfig(
        use_peft=True, use_cpu=True, load_in_4bit=True, bnb_4bit_quant_type="fp4",
        use_bnb_nested_quant=True,
    )  # fmt: skip
    config = quantization_config(settings, "bfloat16")
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(PreferenceConfig(use_cpu=True), "bfloat16") is None


def test_flash_attention_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"flash_attention_2.*widemargin\[flash-attn\]"):
        tiny_config(tmp_path, attn_implementation="flash_attention_2")


def test_a_model_is_loaded_with_the_attention_asked_for(place):
    for name in ("eager", "sdpa"):
        settings = tiny_config(
            place, model_name_or_path=str(place / "model"), attn_implementation=name
        )
        assert load_model(settings).config._attn_implementation == name
