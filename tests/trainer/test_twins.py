"""A twin's run: its steps, its files, its resumption, and the first tokens it tells of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer.cli import main
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.first_pair import first_tokens_line
from widemargin.trainer.data.template import read_chat_template

from tests.support.chat_tokenizers import family_tokenizer
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file as published ones are, for 11 pairs in steps of 4."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.config.use_cache = False  # as an earlier run with gradient checkpointing may leave it
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(WITH_BOS).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 11), ("test", 3)):
        rows = [json.dumps(_row(i)) for i in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_mixer": {str(tmp_path / "data"): 1.0},
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "evaluation_strategy": "steps",
        "do_eval": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "write_report": False,
    }
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _row(i: int) -> dict[str, Any]:
    ask = {"role": "user", "content": f"Is water wet? {'yes ' * (i % 4)}"}
    yes, no = ({"role": "assistant", "content": text} for text in ("yes " * (1 + i), "no"))
    return {"prompt": ask["content"], "chosen": [ask, yes], "rejected": [ask, no]}


def run(file: Path, *overrides: str, script: str | None = "run_simpo") -> int:
    return main(["train", str(file), *overrides], script=script)


def results(file: Path, name: str) -> dict[str, Any]:
    return json.loads((file.parent / "run" / f"{name}_results.json").read_text())


@pytest.mark.costly
def test_a_requeued_twin_goes_on_and_writes_the_scripts_files(file, capsys):
    assert run(file, "--max_steps=1") == 0
    assert "Goes on from" not in capsys.readouterr().out
    assert run(file) == 0
    printed = capsys.readouterr().out
    assert f"Goes on from {file.parent / 'run' / 'checkpoint-1'}; resume_from_che" in printed
    # 11 pairs are 6 micro-batches of 2, which fill three steps of two.
    assert "max_steps:" not in printed
    train, evaluation = results(file, "train"), results(file, "eval")
    assert (train["train_samples"], evaluation["eval_samples"]) == (11, 3)
    assert "eval_rewards/accuracies" in evaluation
    assert results(file, "all") == train | evaluation
    config = json.loads((file.parent / "run" / "config.json").read_text())
    assert config["use_cache"] is True
    assert json.loads((file.parent / "run" / "trainer_state.json").read_text())["global_step"] == 3
    assert run(file, "--resume_from_checkpoint=false", "--max_steps=1") == 0
    assert "Goes on from" not in capsys.readouterr().out


@pytest.mark.costly
def test_widemargin_train_starts_from_the_beginning_and_takes_every_pair(file, capsys):
    overrides = ["--objective=simpo", "--num_train_epochs=1", "--gradient_accumulation_steps=3"]
    assert run(file, *overrides, script=None) == 0
    assert run(file, *overrides, script=None) == 0
    printed = capsys.readouterr().out
    assert "Goes on from" not in printed
    assert "Kept from here, not from the published scripts" in printed
    assert results(file, "train")["train_samples"] == 11
    assert not (file.parent / "run" / "eval_results.json").exists()


def test_preflight_counts_steps_as_the_script_did(file, capsys):
    """Of 6 micro-batches, 4 fill a step; widemargin train makes a second of the other 2."""
    assert run(file, "--gradient_accumulation_steps=4", "--preflight") == 0
    printed = capsys.readouterr().out
    assert "max_steps: 1, as the published script counted them" in printed
    assert "max_steps: 2 trains on all pairs" in printed
    assert "as in the published scripts" in printed


ZEPHYR = (
    "{# system #}"
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def test_the_first_tokens_are_compared_with_the_published_ones():
    published = family_tokenizer("mistral", ZEPHYR)
    joint = Rendering(empty_system=True)
    without = str(first_tokens_line(family_tokenizer("mistral", ZEPHYR), published, joint))
    assert without.startswith("a conversation about PROBE begins with '▁' '<' '|' ")
    assert "; in the published scripts with '<s>' '▁' '<' '|' " in without
    shipped = family_tokenizer("mistral", read_chat_template("zephyr"))
    same = "as in the published scripts"
    assert str(first_tokens_line(shipped, published, joint)).endswith(same)
    twin = Rendering(separate=True, empty_system=True)
    assert str(first_tokens_line(published, published, twin)).endswith(same)
    assert first_tokens_line(tiny_tokenizer(None), published, joint) is None
