"""A folder's model files: replaced as one model, readable as other files, with its processor."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.checkpoint.hub import staged_upload
from widemargin.trainer.model.adapters import name_base
from widemargin.trainer.model.folder import (
    GENERATION,
    code_files,
    copy_processor,
    model_files,
    writing_model,
)

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs, tiny_trainer


def written(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


OF_OTHERS = ("notes.txt", "checkpoint-2/config.json", "merged/model.gguf", "run.json")


@pytest.mark.parametrize(
    "earlier",
    [
        ("adapter_config.json", "adapter_model.safetensors", "merged/model.safetensors"),
        ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"),
        ("chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer.model"),
        ("preprocessor_config.json", "merged/adapter_model.safetensors"),
    ],
)
def test_nothing_of_an_earlier_model_stays(tmp_path, caplog, earlier):
    written(tmp_path, *earlier, *OF_OTHERS, "tokenizer.json")
    with writing_model(tmp_path) as folder:
        written(folder, "tokenizer.json", "new.json")
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"tokenizer.json", "new.json", *OF_OTHERS}
    assert all(name.split("/")[0] in caplog.text for name in earlier)
    assert "tokenizer.json" not in caplog.text


def test_an_earlier_model_stays_where_writing_fails(tmp_path):
    written(tmp_path, "model.safetensors")
    with pytest.raises(FileNotFoundError), writing_model(tmp_path) as folder:
        (folder / "no folder" / "adapter_model.safetensors").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_second_save_says_nothing(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    trainer.save_model()
    assert "Removed" not in caplog.text
    assert {"config.json", "model.safetensors"} <= {path.name for path in model_files(tmp_path)}


def test_an_adapter_in_place_of_a_model_and_back(tmp_path, caplog):
    full, lora = tiny_trainer(tmp_path), tiny_trainer(tmp_path, use_peft=True)
    full.save_model()
    lora.save_model()
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    full.save_model()
    assert not (tmp_path / "adapter_config.json").exists()
    assert "of an earlier model: adapter_config.json, adapter_model.safetensors" in caplog.text


def test_the_merged_model_of_a_run_survives_its_next_save(tmp_path):
    settings = tiny_config(tmp_path, merge_adapter=True)
    trainer = PreferenceTrainer(
        tiny_model(),
        settings,
        tiny_pairs(),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.save_model()
    trainer.save_model(_internal_call=True)  # as a push does
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_that_the_umask_says(tmp_path, umask, mode):
    trainer = tiny_trainer(tmp_path, use_peft=True)
    before = os.umask(umask)
    try:
        trainer.save_model()
    finally:
        os.umask(before)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("use_cache", [True, False, None])
def test_the_config_keeps_use_cache(tmp_path, use_cache):
    model = tiny_model()
    if use_cache is None:
        del model.config.use_cache  # pyright: ignore[reportAttributeAccessIssue]
    else:
        model.config.use_cache = use_cache
    trainer = tiny_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache") is use_cache


def test_the_code_of_a_model_and_no_other_script(tmp_path):
    written(tmp_path, "train.py", "modeling_own.py", "layers.py", "tokenizing.py")
    (tmp_path / "modeling_own.py").write_text("from .layers import Layer\n")
    model = {"AutoConfig": "owner/base--config.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": model}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenizing.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    names = [path.name for path in code_files(tmp_path)]
    assert names == ["layers.py", "modeling_own.py", "tokenizing.py"]
    staged_upload(tmp_path / "upload", tmp_path)
    uploaded = {path.name for path in (tmp_path / "upload").iterdir()}
    assert uploaded == {*names, "config.json", "tokenizer_config.json"}


@pytest.mark.parametrize("adapter", [False, True])
def test_sampling_settings_that_transformers_would_not_save_stay(tmp_path, adapter):
    """A temperature without do_sample, as published models have, and a pad token set later."""
    model = tiny_model()
    model.generation_config = GenerationConfig(temperature=0.6, eos_token_id=[1, 3])
    peft_config = LoraConfig(target_modules=["q_proj"]) if adapter else None
    trainer = PreferenceTrainer(
        model,
        tiny_config(tmp_path, merge_adapter=adapter),
        tiny_pairs(),
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    model.generation_config.pad_token_id = TOKENIZER.pad_token_id
    own = model.generation_config
    trainer.save_model()
    assert model.generation_config is own
    saved = json.loads((tmp_path / ("merged" if adapter else ".") / GENERATION).read_text())
    assert (saved["temperature"], saved["eos_token_id"]) == (0.6, [1, 3])
    assert saved["pad_token_id"] == TOKENIZER.pad_token_id


@pytest.mark.parametrize(
    ("base", "revision", "named"),
    [
        ("owner/model", None, ("owner/model", "v1")),
        ("owner/model", "own", ("owner/model", "own")),
        ("base", None, ("{}/base", None)),
        (None, None, (None, None)),
    ],
)
def test_an_adapter_names_its_base(tmp_path, monkeypatch, base, revision, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    content = {"base_model_name_or_path": base, "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    name_base(tmp_path, "v1")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    place = named[0] and named[0].format(tmp_path)
    assert (config["base_model_name_or_path"], config["revision"]) == (place, named[1])


def test_processors_come_along_or_are_missed(tmp_path, caplog):
    seen, text = AutoConfig.for_model("gemma3"), AutoConfig.for_model("llama")
    written(tmp_path / "base", "preprocessor_config.json")
    for config, folder in ((seen, "a"), (text, "b")):
        (tmp_path / folder).mkdir()
        copy_processor(config, str(tmp_path / "base"), "main", tmp_path / folder)
    assert (tmp_path / "a" / "preprocessor_config.json").read_text() == "preprocessor_config.json"
    assert not list((tmp_path / "b").iterdir())
    assert "Copy the processor" not in caplog.text
    with caplog.at_level(logging.WARNING):
        copy_processor(seen, str(tmp_path / "b"), "main", tmp_path / "a")
    assert "Copy the processor's files" in caplog.text


def test_merging_takes_the_weights_that_trained(tmp_path, caplog):
    tiny_model(seed=0).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trained = tiny_model(seed=5)
    settings = tiny_config(
        tmp_path / "run", merge_adapter=True, model_name_or_path=str(tmp_path / "base")
    )
    own = LoraConfig(target_modules=["q_proj"])
    trainer = PreferenceTrainer(
        trained, settings, tiny_pairs(), processing_class=TOKENIZER, peft_config=own
    )
    trainer.save_model()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    weights = (tiny_model(seed=5).lm_head.weight, merged.lm_head.weight)
    assert torch.equal(*weights)
    assert "has other weights" in caplog.text
