"""Text that a chat template leaves out or moves is flagged, skipped or refused."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import DataSettings, guard, tokenize_pairs
from widemargin.trainer.data.limits import OK, TEXT_LOST
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.tokenized_rows import ASK, NO, YES, ids, text, tokenize

pytestmark = pytest.mark.usefixtures("own_cache")

_ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ROLES_IT_KNOWS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}" + _ASKS
)
MOVES_THE_SYSTEM_TEXT = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endif %}{% if loop.last and m.role == 'assistant' %}{{ messages[0].content }}{% endif %}"
    "{% endfor %}" + _ASKS
)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"prompt": [{"role": "human", "content": "Is water wet?"}]}, guard.PROMPT_LOST),
        ({"prompt": ASK, "chosen": [{"role": "model", "content": "sure"}]}, guard.ANSWER_LOST),
        ({"prompt": [{"role": "developer", "content": "In French."}, *ASK]}, OK),
        ({"prompt": ASK, "chosen": [bot("<think>I ponder</think>yes")]}, OK),
        ({"prompt": ASK, "chosen": [{**bot("yes"), "reasoning_content": "I ponder"}]}, OK),
        ({"prompt": ASK, "tools": [{"type": "function", "function": {"name": "look"}}]}, OK),
        ({"prompt": ASK, "chat_template_kwargs": {"no_such_name": 1}}, OK),
    ],
)
def test_lost_text_is_skipped_or_flagged(row, status):
    (done,) = tokenize({"chosen": YES, "rejected": NO} | row, template=ROLES_IT_KNOWS)
    assert done["status"] == status
    assert (TEXT_LOST in done["flags"]) == (status == OK)
    assert done["detail"]


def test_a_prompt_that_would_be_scored_is_skipped():
    row = {"prompt": [{"role": "system", "content": "In French."}, *ASK], "chosen": YES}
    (done,) = tokenize({**row, "rejected": NO}, template=MOVES_THE_SYSTEM_TEXT)
    assert done["status"] == guard.PROMPT_SCORED


def test_an_answer_may_repeat_its_prompt():
    (done,) = tokenize({"prompt": ASK, "chosen": [bot("Is water wet?")], "rejected": NO})
    assert (done["status"], done["flags"]) == (OK, set())


def test_strict_data_refuses_lost_text_and_reports_show_it():
    row = {"prompt": [{"role": "developer", "content": "In French."}, *ASK]}
    raw = Dataset.from_list([row | {"chosen": YES, "rejected": NO}])
    _, report = tokenize_pairs(raw, tiny_tokenizer(ROLES_IT_KNOWS), name="mine")
    assert f"  {TEXT_LOST}: 1 pairs" in list(report.lines())
    assert "'In French.' of a message with role 'developer'" in report.losses[0]
    with pytest.raises(UserError, match="strict_data: row 0 of train_dataset: left out"):
        tokenize_pairs(raw, tiny_tokenizer(ROLES_IT_KNOWS), DataSettings(strict_data=True))


@settings(max_examples=150, deadline=None)
@given(
    roles=st.lists(st.sampled_from(["system", "user", "tool", "human"]), min_size=1, max_size=4),
    template=st.sampled_from([ROLES_IT_KNOWS, None]),
)
def test_text_is_rendered_flagged_or_refused(roles, template):
    words = [f"word{i}q" for i in range(len(roles))]
    prompt = [{"role": role, "content": w} for role, w in zip(roles, words, strict=True)]
    chosen, rejected = [bot("yes indeed")], [bot("no never")]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    options = {} if template is None else {"template": template}
    (done,) = tokenize(row, **options)
    if done["status"] == OK and TEXT_LOST not in done["flags"]:
        shown, *_ = map(text, ids(done))
        assert all(word in shown for word in words)
