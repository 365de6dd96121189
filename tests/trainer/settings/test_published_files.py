"""Every published setting loads, passes preflight and trains: our files, and theirs as they are.

Model and data are replaced by tiny local ones, by overrides on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer.cli import main
from widemargin.trainer.settings.files import build_config, read_yaml

from tests.support.published_files import EARLY, FILES, script_of
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizers import TEMPLATES, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
OURS = sorted((ROOT / "configs" / "train").glob("*-*.yaml"))
FAMILIES = {
    "llama": ("llama", "with_bos"),
    "mistral": ("mistral", "with_bos"),
    "zephyr": ("mistral", "without_bos"),
    "gemma": ("gemma2", "no_system"),
    "qwen": ("qwen2", "default_system"),
}
SHORT = {"use_cpu": True, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model of each family, and one of data with all splits."""
    folder = tmp_path_factory.mktemp("published")
    for name, (family, template) in FAMILIES.items():
        tiny_model(family, num_hidden_layers=1).save_pretrained(folder / f"tiny-{name}")
        tiny_tokenizer(TEMPLATES[template]).save_pretrained(folder / f"tiny-{name}")
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 9), ("test", 3), ("train_prefs", 9), ("test_prefs", 3)):
        lines = [json.dumps(_row(i)) for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _row(i: int) -> dict[str, Any]:
    question = f"Is water wet? {'yes ' * (i % 4)}"

    def side(answer: str) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    return {
        "prompt": question,
        "chosen": side("yes, it is wet." + " yes" * (i % 3)),
        "rejected": side("no " * (1 + i % 5)),
        "score_chosen": 8.0,
    }


def small(place: Path, settings: dict[str, Any], output: Path) -> list[str]:
    """Overrides that put the tiny model and data in place, and train two steps on the CPU."""
    name = settings["model_name_or_path"].lower()
    family = next(f for f in ("zephyr", "mistral", "gemma", "qwen", "llama") if f in name)
    changes = {
        "model_name_or_path": place / f"tiny-{family}",
        "dataset_mixer": {str(place / "data"): 1.0},
        "output_dir": output,
        "preprocessing_num_workers": None,
        "report_to": "none",
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **SHORT,
    }
    if settings.get("load_in_4bit"):  # which wants a GPU
        changes["load_in_4bit"] = False
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
    return [f"--{key}={json.dumps(value)}" for key, value in plain.items()]


def run_both_ways(argv: list[str], output: Path, script: str | None, capsys) -> dict[str, Any]:
    """Preflight, then training; ``run.json`` of it."""
    assert main(["train", *argv, "--preflight"], script=script) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "9 pairs" in printed
    assert "First pair" in printed
    assert main(["train", *argv, "--write_report=false"], script=script) == 0
    capsys.readouterr()
    return json.loads((output / "run.json").read_text())


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_files(path, place, tmp_path, capsys):
    settings = read_yaml(path)
    argv = [str(path), *small(place, settings, tmp_path / "run")]
    run = run_both_ways(argv, tmp_path / "run", None, capsys)
    assert run["summary"]["steps"] == 2
    assert run["objective"]["name"] == settings["objective"]
    assert run["objective"]["beta"] == settings["beta"]
    assert run["data"]["train"]["pairs"] == 9


@pytest.mark.parametrize("name", [*FILES, *EARLY])
def test_their_files(name, place, tmp_path, capsys):
    settings = FILES.get(name) or EARLY[name]
    script = script_of(name) if name in FILES else "run_simpo"
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(settings))
    argv = [str(path), *small(place, settings, tmp_path / "run"), "--packing=padded"]
    run = run_both_ways(argv, tmp_path / "run", script, capsys)
    assert run["summary"]["steps"] == 2
    wanted = {"run_lmpo": "lmpo", "run_simpo": "simpo", "run_xpo": "gamma-simpo"}[script]
    assert run["objective"]["name"] == wanted


def test_there_is_a_file_for_each_published_setting():
    assert {path.stem for path in OURS} == set(FILES)


# What a run does not depend on; the templates, which our files name or leave to the tokenizer; and
# what is better than in the scripts, which our files keep and the twins do not.
ASIDE = {
    *("output_dir", "run_name", "logging_dir", "hub_model_id", "report_to", "log_level"),
    *("preprocessing_num_workers", "save_strategy", "save_steps", "save_total_limit", "do_eval"),
    *("chat_template", "tokenizer_as_saved", "auto_insert_empty_system_msg", "chat_rendering"),
    *("head_tail", "resume_from_checkpoint"),
}


@pytest.mark.parametrize("name", FILES)
def test_our_files_say_what_theirs_mean(name):
    ours = build_config(read_yaml(ROOT / "configs" / "train" / f"{name}.yaml") | SHORT)
    theirs = FILES[name] | {"report_to": "none"} | SHORT
    meant = build_config(theirs, script=script_of(name))
    for field in dataclasses.fields(ours):
        if field.name not in ASIDE and not field.name.startswith("_") and field.init:
            value = getattr(ours, field.name), getattr(meant, field.name)
            if field.name != "objective_args":
                assert value[0] == value[1], field.name
    hyperparameters = dataclasses.asdict(ours.build_objective().hyperparameters)
    if "zscore_bias_correction" in hyperparameters:
        hyperparameters["zscore_bias_correction"] = False
    assert dataclasses.asdict(meant.build_objective().hyperparameters) == hyperparameters


@pytest.mark.parametrize("name", FILES)
def test_rendering_of_our_files_is_that_of_the_published_scripts(name):
    """An empty system message where the published template has a place for one that shows."""
    ours = read_yaml(ROOT / "configs" / "train" / f"{name}.yaml")
    shows = name.endswith("mistral-7b-base") or "qwen" in name
    assert ours.get("auto_insert_empty_system_msg", False) == shows
    mistral = name.endswith("mistral-7b-instruct")
    base = "zephyr" if name.endswith("mistral-7b-base") else None  # the same, with BOS
    assert ours.get("chat_template") == ("mistral" if mistral else base)
    meant = build_config(FILES[name] | SHORT | {"report_to": "none"}, script=script_of(name))
    assert meant.auto_insert_empty_system_msg
    assert (meant.chat_template == "mistral") == mistral


def test_attention_is_as_published():
    for name, theirs in FILES.items():
        ours = read_yaml(ROOT / "configs" / "train" / f"{name}.yaml")
        assert ours["attn_implementation"] == theirs["attn_implementation"]


@pytest.mark.parametrize("script", ["run_lmpo", "run_simpo", "run_xpo"])
def test_scripts_as_modules(script, place, tmp_path, monkeypatch, capsys):
    """The launchers' form; a mistake ends in exit code 2, in one line."""
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(FILES["lmpo-llama3-8b-base"]))
    overrides = small(place, FILES["lmpo-llama3-8b-base"], tmp_path / "run")
    if script != "run_xpo":  # whose files name their objective
        overrides.append("--beta=-1")
    monkeypatch.setattr(sys, "argv", [script, str(path), *overrides])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"widemargin.trainer.{script}", run_name="__main__")
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: objective: none" if script == "run_xpo" else "error: beta")
