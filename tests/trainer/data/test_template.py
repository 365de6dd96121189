"""The tokenizer of a run: its template by name, its date, and processors that hold one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings
from widemargin.trainer.data.formats.messages import in_forms
from widemargin.trainer.data.pairs import tokenize_pairs
from widemargin.trainer.data.template import (
    bos_apart,
    content_forms,
    own_tokenizer,
    with_template,
)
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, user
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer

DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + WITH_BOS
LAST_USER_ONLY = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "<|user|>{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}{{ m.content }}<|end|>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_dated_template_writes_the_date_of_the_settings_and_is_saved_as_it_was() -> None:
    tokenizer, settings = tiny_tokenizer(DATED), DataSettings(chat_date="2026-01-31")
    dated = with_template(tokenizer, settings)
    assert "Today: 31 Jan 2026" in dated.apply_chat_template([user("?")], tokenize=False)
    assert tokenizer.chat_template == DATED
    today = DataSettings()
    with_template(tokenizer, today)
    assert today.chat_date is not None
    odd = tiny_tokenizer("{{ strftime_now(form) }}{{ strftime_now('%Y') }}")
    with pytest.raises(UserError, match="cannot be kept"):
        with_template(odd, DataSettings())
    with pytest.raises(UserError, match="chat_date"):
        DataSettings(chat_date="tomorrow").check()


def test_named_templates_without_a_default_need_a_choice() -> None:
    tokenizer: Any = tiny_tokenizer(None)
    tokenizer.chat_template = {"rag": WITH_BOS, "tool_use": WITH_BOS}
    with pytest.raises(UserError, match="rag, tool_use"):
        with_template(tokenizer, DataSettings())
    assert with_template(tokenizer, DataSettings(chat_template="rag")).chat_template == WITH_BOS


def test_a_processor_gives_its_tokenizer_and_its_template() -> None:
    tokenizer: Any = tiny_tokenizer(None)
    found = own_tokenizer(SimpleNamespace(tokenizer=tokenizer, chat_template=WITH_BOS))
    assert found is tokenizer
    assert tokenizer.chat_template == WITH_BOS

    class MistralCommonBackend:
        chat_template = None

    with pytest.raises(UserError, match="mistral-common"):
        own_tokenizer(MistralCommonBackend())


def test_system_text_of_a_last_user_turn_is_folded_in() -> None:
    tokenizer: Any = tiny_tokenizer(LAST_USER_ONLY)
    system = {"role": "system", "content": "Answer briefly."}
    row = {
        "prompt": [system, user("wet?")],
        "chosen": [bot("yes")],
        "rejected": [bot("no")],
    }
    data, _ = tokenize_pairs(Dataset.from_list([row]), tokenizer)
    prompt = tokenizer.apply_chat_template(row["prompt"], return_dict=False)
    assert data[0]["prompt_ids"] == prompt
    assert tokenizer.decode(data[0]["chosen_ids"]) == "yes</s>"
    tokenizer.chat_template = LAST_USER_ONLY.replace(
        "{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}{{ m.content }}",
        "{{ m.content }}{% if loop.last and s is defined %}{{ s }}{% endif %}",
    )
    with pytest.raises(UserError, match="put it into the first user message"):
        tokenize_pairs(Dataset.from_list([row]), tokenizer)


def calling(arguments: str) -> str:
    """A template that writes calls, their arguments so."""
    return (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{{% set given = c.function.arguments %}}{{{{ {arguments} }}}}{{% endfor %}}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


@pytest.mark.parametrize("given", ['{"city": "Łódź", "to": null}', {"city": "Łódź", "to": None}])
@pytest.mark.parametrize(
    "arguments",
    ["given | tojson", "given if given is string else given | tojson", "'' + given", "given"],
    ids=["as JSON", "as JSON or text", "added to text", "printed"],
)
def test_arguments_of_calls_are_written_once_and_as_json(arguments: str, given: Any) -> None:
    tokenizer = tiny_tokenizer(calling(arguments))
    call = {"type": "function", "function": {"name": "fly", "arguments": given}}
    messages = in_forms([{**bot(""), "tool_calls": [call]}], content_forms(tokenizer))
    written = tokenizer.apply_chat_template([user("?"), *messages], tokenize=False)
    assert json.loads(str(written).split("<|assistant|>")[1].split("<|end|>")[0]) == {
        "city": "Łódź",
        "to": None,
    }


def test_arguments_that_are_no_json_stay_and_blank_ones_are_none() -> None:
    forms = content_forms(tiny_tokenizer(calling("given | tojson")))
    for given, right in (('{"city": ', '{"city": '), (" ", {})):
        [message] = in_forms(
            [{**bot(""), "tool_calls": [{"name": "fly", "arguments": given}]}], forms
        )
        assert message["tool_calls"] == [{"name": "fly", "arguments": right}]


def test_several_named_templates_are_no_shipped_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert not bos_apart(tokenizer)
