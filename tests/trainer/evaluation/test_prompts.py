"""The published evaluations: how their prompts begin, and which questions they asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from widemargin.trainer.cli import main
from widemargin.trainer.data.template import read_chat_template
from widemargin.trainer.evaluation.answering import render
from widemargin.trainer.evaluation.questions import Question
from widemargin.trainer.evaluation.settings import AnswerSettings, answer_settings
from widemargin.trainer.settings.files import read_yaml

from tests.support.chat_tokenizers import family_tokenizer
from tests.support.eval_files import save_arena, save_model

ALL = sorted((Path(__file__).resolve().parents[3] / "configs" / "eval").glob("*.yaml"))
CONFIGS = [path for path in ALL if "mistral" in path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", ["mistral", "mistral, newer file"])
def test_prompts_of_mistral_models_begin_as_published(path, family):
    """One ``<s>``, and after it the tokens of the text alone, whichever way the tokenizer has."""
    config = read_yaml(path)
    tokenizer = family_tokenizer(family, read_chat_template(config["chat_template"]))
    settings = AnswerSettings(system_prompt=config.get("system_prompt"))
    (prompt,) = render([Question("1", "Is water wet?", {})], settings, tokenizer)
    base = "<|system|>\n</s>\n<|user|>\nIs water wet?</s>\n<|assistant|>\n"
    published = base if path.stem.endswith("base") else "[INST] Is water wet? [/INST]"
    expected = tokenizer(published, add_special_tokens=False)["input_ids"]
    assert prompt == [tokenizer.bos_token_id, *expected]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_arena_hard_asks_the_questions_that_the_repositories_used(path):
    arena, alpaca = (answer_settings(path, name, []) for name in ("arena_hard", "alpaca_eval"))
    assert str(arena.questions).endswith("arena-hard-v0.1/question.jsonl")
    assert alpaca.questions is None


def test_the_questions_of_a_config_are_asked(tmp_path, capsys):
    questions, config = save_arena(tmp_path / "q.jsonl"), tmp_path / "c.yaml"
    model = save_model(tmp_path / "model")
    config.write_text(f"arena_hard:\n  questions: {questions}\n  max_new_tokens: 2\n")
    argv = ["--model", model, "--config", str(config), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "arena-hard", *argv, "--limit", "2", "--no-judge"]) == 0
    assert "2 answers" in capsys.readouterr().out
