"""A folder that holds an adapter, given as the model: it goes on learning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.models import read_model
from widemargin.trainer.evaluation.settings import PairSettings
from widemargin.trainer.model.adapters import with_adapter
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.model.loading import load_model, load_model_config, load_tokenizer

from tests.support.tiny_models import TOKENIZER, parameters_of, tiny_config, tiny_model, tiny_pairs


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A base and an adapter on it, as after supervised training."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(str(adapter))
    return base, adapter


def test_training_goes_on_with_the_adapter(folders, tmp_path):
    base, adapter = folders
    args = tiny_config(tmp_path / "run", objective="dpo", max_steps=2, merge_adapter=True)
    trainer = PreferenceTrainer(str(adapter), args, train_dataset=tiny_pairs())
    model: Any = trainer.model
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert trainer.train().training_loss < 0.7
    trainer.save_model()
    ids = torch.arange(5, 15)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged").eval()
    saved = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "run")
    ).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        for found in (merged, saved):
            torch.testing.assert_close(found(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_first_loss_is_that_of_the_adapted_model(folders, tmp_path):
    """The reference is the model as it comes, adapter included, so DPO begins at ln 2."""
    args = tiny_config(tmp_path / "run", objective="dpo", max_steps=1)
    result = PreferenceTrainer(str(folders[1]), args, train_dataset=tiny_pairs()).train()
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)


def test_an_adapter_beside_its_models_config_is_an_adapter(folders, tmp_path):
    """As axolotl writes it."""
    base, adapter = folders
    settings: Any = tiny_config(tmp_path / "run", model_name_or_path=str(adapter))
    expected = load_model(settings)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    found = load_model(settings)
    assert isinstance(found, PeftModel)
    assert torch.equal(parameters_of(found), parameters_of(expected))
    shutil.copy(base / "model.safetensors", adapter)
    with pytest.raises(UserError, match="it has both"):
        load_model(settings)


def test_an_adapter_that_transformers_put_into_a_model_is_one(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    patch_head(model)
    with pytest.raises(UserError, match="has an adapter already"):
        with_adapter(model, LoraConfig(target_modules=["k_proj"], r=2))


def test_config_tokenizer_and_evaluation_read_it_too(folders):
    base, adapter = folders
    settings: Any = tiny_config(adapter, model_name_or_path=str(adapter))
    assert load_model_config(settings).model_type == "llama"
    assert load_tokenizer(settings).get_vocab() == TOKENIZER.get_vocab()
    plain = read_model(PairSettings(), str(adapter))
    assert not hasattr(plain, "get_base_model")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = load_model(settings).eval()(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        other = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
    assert (other - expected).abs().max() > 1e-2


def test_an_adapter_that_does_not_say_its_base(folders):
    path = folders[1] / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter .* base_model_name_or_path"):
        load_model(tiny_config(folders[1]), str(folders[1]))


def test_a_second_adapter_on_it_is_refused(folders, tmp_path):
    args = tiny_config(tmp_path / "run", use_peft=True)
    with pytest.raises(UserError, match="has an adapter already"):
        PreferenceTrainer(str(folders[1]), args, train_dataset=tiny_pairs())


@pytest.mark.parametrize("inside", ["", "merged", "checkpoint-2"])
def test_an_adapter_does_not_replace_its_base(folders, tmp_path, capsys, inside):
    """The base's weights were removed, and the adapter alone is no model."""
    base = tmp_path / "run" / inside
    shutil.copytree(folders[0], base)
    args = tiny_config(tmp_path / "run", use_peft=True)
    refused = rf"output_dir: name another folder.* {base}, the model that the adapter needs"
    with pytest.raises(UserError, match=refused):
        PreferenceTrainer(str(base), args, train_dataset=tiny_pairs())
    (tmp_path / "run.yaml").write_text("objective: simpo\nuse_peft: true\ndataset: none.jsonl\n")
    settings = [f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", str(tmp_path / "run.yaml"), *settings]) == 2
    assert main(["merge", str(folders[1]), f"--out={folders[0]}"]) == 2
    errors = capsys.readouterr().err
    assert "output_dir: name another" in errors
    assert "--out: name another" in errors
    assert (base / "model.safetensors").is_file()
    assert (folders[0] / "model.safetensors").is_file()


ADDED = [len(TOKENIZER), len(TOKENIZER) + 1]


@pytest.mark.parametrize("learning", [None, ADDED], ids=["kept", "new tokens learn"])
def test_an_adapter_of_a_resized_vocabulary(folders, tmp_path, learning):
    """Tokens were added; the adapter's folder has the embeddings, its base has them not."""
    base, _ = folders
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(TOKENIZER) + 2, mean_resizing=False)
    args = tiny_config(tmp_path / "run", model_name_or_path=str(base), merge_adapter=True)
    trainer = PreferenceTrainer(
        model,
        args,
        tiny_pairs(),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(
            target_modules=["q_proj"],
            r=2,
            init_lora_weights=False,
            trainable_token_indices=learning,
        ),
    )
    trainer.save_model()
    ids = torch.tensor([[5, 6, len(TOKENIZER) + 1, 7]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    again = load_model(tiny_config(tmp_path / "run"), str(tmp_path / "run"))
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        for found in (merged, again):
            logits = found.eval()(input_ids=ids).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_without_weights_is_said(folders):
    (folders[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^adapter .*: copy its weights there too, adapter_model"):
        load_model(tiny_config(folders[1]), str(folders[1]))


def test_a_base_that_was_moved_is_said(folders):
    base, adapter = folders
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(UserError, match=rf"^adapter {adapter}: its base model is no longer at"):
        load_model(tiny_config(adapter), str(adapter))
