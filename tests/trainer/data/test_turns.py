"""Which tokens of an answer are scored: the assistant's words and their end, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from widemargin.trainer.data import DataSettings
from widemargin.trainer.data.pairs import tokenize_pairs
from widemargin.trainer.data.turns import end_of_turn_id
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import Row, bot, user
from tests.support.tiny_tokenizers import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Drops the reasoning of earlier answers.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set c = m.content %}{% if m.role == 'assistant' and loop.index0 < ns.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Ends the last answer with a token of its own, and earlier ones with another.
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
#: Closes the conversation, besides the turn.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
#: Two special tokens after each answer, and generation stops at the second.
COHERE = (
    "{% for m in messages %}<|START|><|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|><|assistant|>{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|return|>", "<|START|>",
    "<|END_RESPONSE|>", "<|END_TURN|>", "<think>", "</think>", "[INST]", "[/INST]",
]  # fmt: skip
COHERE_END = "<|END_RESPONSE|><|END_TURN|>"
#: Template, end of an earlier answer, end of the last, EOS.
STYLES: dict[str, tuple[str, str, str, str]] = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>", "</s>"),
    "marked": (MARKED, "<|im_end|>", "<|im_end|>", "</s>"),
    "qwen3": (QWEN3, "<|im_end|>", "<|im_end|>", "<|im_end|>"),
    "gpt-oss": (GPT_OSS, "<|end|>", "<|return|>", "<|return|>"),
    "phi3": (PHI3, "<|end|>", "<|end|>", "</s>"),
    "cohere": (COHERE, COHERE_END, COHERE_END, "<|END_TURN|>"),
    "mistral": (MISTRAL, "</s>", "</s>", "</s>"),
}  # fmt: skip
TALK = [user("one?"), bot("uno"), user("two?"), bot("dos"), user("three?"), bot("tres")]
TOOL = {"role": "tool", "content": "31 degrees"}


def style(name: str) -> Any:
    template, _, _, eos = STYLES[name]
    tokenizer: Any = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in SPECIAL], special_tokens=True)
    tokenizer.eos_token = eos
    return tokenizer


def scored(tokenizer: Any, row: Row, **more: Any) -> tuple[Row, str]:
    """The tokenized row, and the text of the scored tokens of its chosen answer."""
    given = DataSettings(**more)
    data, _ = tokenize_pairs(Dataset.from_list([row]), tokenizer, given)
    left = set(data[0].get("chosen_unscored", []))
    kept = [token for i, token in enumerate(data[0]["chosen_ids"]) if i not in left]
    return data[0], tokenizer.decode(kept)


@pytest.mark.parametrize("name", STYLES)
def test_the_end_of_an_answer_is_where_generation_stops(name: str) -> None:
    _, _, last, _ = STYLES[name]
    tokenizer = style(name)
    assert last.endswith(tokenizer.decode([end_of_turn_id(tokenizer)]))
    row = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": [bot("eins")]}
    assert scored(tokenizer, row)[1] == "uno" + last


@pytest.mark.parametrize("setting", [{"score": "all_assistant"}, {"chat_rendering": "separate"}])
def test_a_pair_keeps_its_numbers_where_its_prompt_ends_elsewhere(setting: Any) -> None:
    row = {"chosen": TALK[:4], "rejected": [*TALK[:3], bot("zwei")], "weight": 0.5, "margin": 2.0}
    data, _ = tokenize_pairs(Dataset.from_list([row]), style("chatml"), DataSettings(**setting))
    assert (data[0]["weight"], data[0]["margin"]) == (0.5, 2.0)


def test_a_generation_config_names_the_end(tmp_path: Any) -> None:
    tokenizer = style("gpt-oss")
    tokenizer.chat_template = GPT_OSS.replace("<|return|>", "<|im_end|><|return|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(tokenizer) != stop
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{stop}]}}')
    row = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": [bot("eins")]}
    assert scored(tokenizer, row)[1] == "uno<|im_end|>"


@pytest.mark.parametrize("name", STYLES)
def test_of_several_turns_only_the_assistants_are_scored(name: str) -> None:
    _, inner, last, _ = STYLES[name]
    tokenizer = style(name)
    row = {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": [bot("zwei")]}
    expected = {
        "completion": f"dos{inner}tres{last}",
        "last_turn": f"tres{last}",
        "all_assistant": f"uno{inner}dos{inner}tres{last}",
        "answer": f"dos{inner}tres{last}",
    }
    for score, text in expected.items():
        tokens, seen = scored(tokenizer, row, score=score)
        assert seen == text, score
        whole = tokenizer.apply_chat_template(TALK, return_dict=False)
        ours = tokens["prompt_ids"] + tokens["chosen_ids"]
        assert ours == whole[: len(ours)]
    tooled = {
        "prompt": TALK[:1],
        "chosen": [bot("I look."), TOOL, bot("31")],
        "rejected": [bot("5")],
    }
    assert scored(tokenizer, tooled)[1] == f"I look.{inner}31{last}"
    called = {
        "prompt": [*TALK[:1], bot("I look.")],
        "chosen": [*TALK[:1], bot("I look."), TOOL, bot("31")],
        "rejected": [*TALK[:1], bot("I look."), {**TOOL, "content": "5 degrees"}, bot("5")],
    }
    assert scored(tokenizer, called)[1] == f"31{last}"
    unfinished = tooled | {"chosen": [bot("I look."), TOOL]}
    assert scored(tokenizer, unfinished)[1] == f"I look.{inner}"


def test_reasoning_is_read_and_not_scored() -> None:
    tokenizer = style("qwen3")
    thought = "<think>\nwell\n</think>\n\nyes"
    row = {"prompt": TALK[:1], "chosen": [bot(thought)], "rejected": [bot("no")]}
    assert scored(tokenizer, row)[1] == thought + "<|im_end|>"
    tokens, seen = scored(tokenizer, row, score="answer")
    assert seen == "yes<|im_end|>"
    assert tokenizer.decode(tokens["chosen_ids"]) == thought + "<|im_end|>"
    row["prompt"] = [user("well?")]
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    assert scored(tokenizer, row, score="answer")[1] == "yes<|im_end|>"
    plain = {"prompt": "why?", "chosen": "<think>so</think> yes", "rejected": "no"}
    assert scored(tokenizer, plain, score="answer")[1] == " yes<|im_end|>"
    unending = row | {"chosen": [bot("<think>on and on")]}
    with pytest.raises(UserError, match="nothing of an answer is scored"):
        scored(tokenizer, unending, score="answer")


WORDS = st.lists(st.sampled_from(["yes", "no", "maybe", "wet"]), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(STYLES)),
    st.lists(st.tuples(st.booleans(), WORDS, WORDS), min_size=1, max_size=3),
    st.sampled_from(["completion", "last_turn", "all_assistant"]),
)
def test_any_answer_of_several_turns_is_scored_on_its_own_words(
    name: str, turns: list[Any], score: str
) -> None:
    _, inner, last, _ = STYLES[name]
    answers, messages = [], []
    for tool, words, asked in turns:
        answers.append(" ".join(words))
        messages += [bot(answers[-1]), (TOOL if tool else user(" ".join(asked)))]
    answers = answers[-1:] if score == "last_turn" else answers
    row = {"prompt": [user("?")], "chosen": messages[:-1], "rejected": [bot("other")]}
    assert scored(style(name), row, score=score)[1] == inner.join(answers) + last


def test_a_begun_answer_goes_on() -> None:
    row = {
        "prompt": [user("?"), bot("The capital is")],
        "chosen": [bot(" Paris")],
        "rejected": [bot(" London")],
    }
    for name in STYLES:
        tokenizer = style(name)
        tokens, seen = scored(tokenizer, row)
        assert seen == " Paris" + STYLES[name][2]
        open_end = tokenizer.apply_chat_template(
            row["prompt"], continue_final_message=True, return_dict=False
        )
        assert tokens["prompt_ids"] == open_end
    everything = scored(style("chatml"), row, score="all_assistant")[1]
    assert everything == "The capital is Paris<|im_end|>"


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_yet_to_be_written_is_none(name: str) -> None:
    row = {"prompt": [user("wet?")], "chosen": [bot("yes")], "rejected": [bot("no")]}
    tokenizer = style(name)
    assert scored(tokenizer, row | {"prompt": [user("wet?"), bot(" ")]}) == scored(tokenizer, row)


def test_token_ids_say_what_is_not_scored_themselves() -> None:
    row = {"prompt_ids": [1], "chosen_ids": [4, 5, 6], "rejected_ids": [7], "chosen_unscored": [1],
           "rejected_unscored": []}  # fmt: skip
    tokens, _ = scored(style("chatml"), row)
    assert tokens["chosen_unscored"] == [1]
    with pytest.raises(UserError, match="set score: completion"):
        scored(style("chatml"), row, score="last_turn")
    with pytest.raises(UserError, match="past the end"):
        scored(style("chatml"), row | {"chosen_unscored": [3]})
    with pytest.raises(UserError, match="set that"):
        scored(style("chatml"), row, score="answer", chat_rendering="separate")
