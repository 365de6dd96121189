"""What models, settings and checkpoints from elsewhere cannot do: see SECURITY.md."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.loading import load_model
from widemargin.trainer.monitor.run_record import changed_settings
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs, tiny_trainer

TOKEN = "hf_thisIsASecret"


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_refused(tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "ran"
    tiny_model().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Planted(mark)}, folder / "pytorch_model.bin")
    config = tiny_config(tmp_path, model_name_or_path=str(folder))
    with pytest.raises(UserError, match="safetensors"):
        load_model(config)
    assert not mark.exists()


def test_code_beside_a_model_does_not_run(tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "ran"
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "planted",
        "auto_map": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(tiny_config(tmp_path, model_name_or_path=str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_in_a_checkpoint_does_not_run(tmp_path, file):
    """Not even in one without a manifest."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path / "run", **settings).train()
    folder, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "ran"
    torch.save({"state": Planted(mark)}, folder / file)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-1: cannot be read: UnpicklingError"):
        tiny_trainer(tmp_path / "again", **settings).train(resume_from_checkpoint=str(folder))
    assert not mark.exists()


def test_secrets_are_not_written(tmp_path):
    settings = {"hub_token": TOKEN, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    trainer.save_model()
    assert TOKEN not in json.dumps(changed_settings(trainer.args))
    assert TOKEN.encode() not in pickle.dumps(trainer.args)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not any(path.name == "training_args.bin" for path in written)
    with pytest.raises(UserError) as raised:
        build_config({"objective": "simpo", "hub_token": [TOKEN]})
    assert TOKEN not in str(raised.value)


def test_limits_are_no_secrets(tmp_path):
    config = tiny_config(tmp_path, max_tokens_per_micro_batch=512)
    assert changed_settings(config)["max_tokens_per_micro_batch"] == 512


def test_escape_codes_of_data_do_not_reach_the_terminal(tmp_path):
    from widemargin.trainer.data.first_pair import preflight_lines

    row = {"prompt": "\x1b[2Jhi\u202e", "chosen": "yes\x07", "rejected": "no\x00\r"}
    pairs, report = tokenize_pairs(
        Dataset.from_list([row, row | {"chosen": row["rejected"]}, *tiny_pairs(2)]), TOKENIZER
    )
    lines = [*preflight_lines(pairs[0], TOKENIZER), *report.lines()]
    assert all(line.isprintable() for line in lines)


def test_only_settings_that_somebody_gave(tmp_path):
    """Not what transformers and this project put in place of defaults on this machine."""
    found = changed_settings(PreferenceConfig(objective="simpo", output_dir=str(tmp_path)))
    assert found == {"objective": "simpo", "output_dir": str(tmp_path)}
    checkpointing = tiny_config(tmp_path, gradient_checkpointing=True)
    names = {"gradient_checkpointing", "activation_checkpointing"}  # by transformers' version
    assert len(names & changed_settings(checkpointing).keys()) == 1
    given = {"accelerator_config": {"use_seedable_sampler": False}, "per_device_eval_batch_size": 3}
    config = PreferenceConfig(objective="simpo", output_dir=str(tmp_path), **given)
    found = changed_settings(config)
    assert found["accelerator_config"]["use_seedable_sampler"] is False
    assert found["per_device_eval_batch_size"] == 3
    config.gradient_accumulation_steps = 7
    config.per_device_eval_batch_size = 5
    found = changed_settings(config)
    assert (found["gradient_accumulation_steps"], found["per_device_eval_batch_size"]) == (7, 5)


def test_settings_in_lists_are_plain_too(tmp_path):
    found = changed_settings(tiny_config(tmp_path, debug="underflow_overflow"))
    assert yaml.safe_load(yaml.safe_dump(found))["debug"] == ["underflow_overflow"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"chosen": turns, "rejected": turns}]
    with pytest.raises(UserError):
        tokenize_pairs(Dataset.from_list(rows), tokenizer)
    assert not (tmp_path / "ran").exists()


def test_a_config_beyond_its_files_is_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for name, value in (("num_hidden_layers", 10**7), ("vocab_size", 10**9)):
        (folder / "config.json").write_text(json.dumps(content | {name: value}))
        with pytest.raises(UserError, match="describes far more weights than fit"):
            load_model(tiny_config(tmp_path, model_name_or_path=str(folder)))


def test_every_claim_names_tests_that_exist():
    root = Path(__file__).resolve().parents[2]
    page = (root / "SECURITY.md").read_text(encoding="utf-8")
    files = (root / "tests").rglob("test_*.py")
    known = {name for f in files for name in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    named = [set(re.findall(r"`(test_\w+)`", row)) for row in rows]
    assert len(rows) > 10
    assert all(named)
    assert set().union(*named) - known == set()
