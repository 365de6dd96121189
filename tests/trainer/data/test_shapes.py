"""Data sets in the shapes that people have: known by their columns, and told in the report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.formats.messages import without_nulls
from widemargin.trainer.data.sources import checked_columns
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, user
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
Q, GOOD, BAD = "Is water wet?", "yes, it is", "no"
SIDES = {"chosen": GOOD, "rejected": BAD}
TURN = "<s><|user|>\nIs water wet?<|end|>\n<|assistant|>\n"


def made(rows, **settings):
    tokenizer = tiny_tokenizer()
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    pairs, report = tokenize_pairs(data, tokenizer, DataSettings(**settings))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    texts = [tuple(str(tokenizer.decode(row[name])) for name in names) for row in pairs]
    return texts, "\n".join(report.lines())


said = {"from": "gpt", "value": GOOD}
KNOWN = {
    "orca": {"question": Q, **SIDES},
    "alpaca": {"instruction": "Is water", "input": "wet?", **SIDES},
    "sharegpt": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": said,
        "rejected": {"from": "gpt", "value": BAD},
    },
    "swift": {"messages": [user(Q), bot(GOOD)], "rejected_response": BAD},
    "swift, conversations": {
        "messages": [user(Q), bot(GOOD)], "rejected_messages": [user(Q), bot(BAD)],
    },
    "when2call": {"messages": [user(Q)], "chosen_response": bot(GOOD), "rejected_response": BAD},
    "argilla": {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD},
    "ultrafeedback": {
        "instruction": Q,
        "completions": [
            {"response": "maybe", "overall_score": 5.0},
            {"response": BAD, "overall_score": 1.0},
            {"response": GOOD, "overall_score": 9.0},
        ],
    },
    "nectar": {
        "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
        "answers": [{"answer": BAD, "rank": 7.0}, {"answer": GOOD, "rank": 1.0}],
    },
    "helpsteer2": {
        "prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 2,
    },
    "helpsteer3": {
        "context": [user(Q)], "response1": GOOD, "response2": BAD, "overall_preference": -1,
    },
    "beavertails": {
        "prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1,
    },
    "shp": {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_become_the_same_pair_and_are_named(name):
    texts, lines = made([KNOWN[name] | {"id": 3}], edges="best-worst")
    prompt = TURN.replace(" wet", "\nwet") if name == "alpaca" else TURN
    assert texts == [(prompt, f"{GOOD}<|end|>", f"{BAD}<|end|>")]
    assert "read as " in lines
    assert "nothing reads its columns id" in lines


def test_helpsteers_answers_are_paired_by_prompt():
    rows = [{"prompt": Q, "response": r, "helpfulness": h} for r, h in ((BAD, 1), (GOOD, 4))]
    rows += [{"prompt": "a", "response": r, "helpfulness": 2} for r in "bc"]
    texts, lines = made(rows)
    assert texts == [(TURN, f"{GOOD}<|end|>", f"{BAD}<|end|>")]
    assert "4 answers became 1 pairs" in lines


def test_columns_that_pairing_leaves_behind_are_said():
    rows = [
        {"prompt": "a", "response": r, "helpfulness": h, "weight": 2.0, "system": "Be brief."}
        for r, h in (("x", "1"), ("y", "3"), ("z", "N/A"))
    ]
    _, notes = checked_columns("data", Dataset.from_list(rows))
    assert "nothing reads its columns weight, system" in notes
    assert not any("multiplied" in note for note in notes)


def test_a_preference_that_is_no_number_skips_its_row():
    rows = [{"prompt": "a", "response_1": "x", "response_2": "y", "preference_strength": s}
            for s in (2.0, float("nan"))]  # fmt: skip
    _, report = tokenize_pairs(Dataset.from_list(rows), tiny_tokenizer())
    assert report.pairs == 1
    assert sum(report.skipped.values()) == 1


def test_tokenized_columns_are_read_or_named():
    row = {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6], "note": "x"}
    row |= {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0}
    kept, notes = checked_columns("data", Dataset.from_list([row]), {"prompt": "question"})
    assert {"reference_chosen_logps", "reference_rejected_logps"} <= set(kept.column_names)
    assert "nothing reads its columns note" in notes
    assert any("hold token ids" in note for note in notes)


def test_token_ids_may_have_other_names():
    """As in older versions of TRL."""
    sides = ("prompt", "chosen", "rejected")
    row = {f"{side}_input_ids": [number, 9] for number, side in enumerate(sides, 4)}
    renamed = {f"{side}_ids": f"{side}_input_ids" for side in sides}
    pairs, _ = tokenize_pairs(
        Dataset.from_list([row]), tiny_tokenizer(), DataSettings(columns=renamed)
    )
    assert [pairs[0][name] for name in renamed] == [[4, 9], [5, 9], [6, 9]]


def test_system_and_history_go_before_the_prompt():
    before = {"system": "In French.", "history": [["Hi", "Hello"]]}
    (triple,), _ = made([{"prompt": Q, **SIDES, **before}])
    spoken = "".join(
        f"<|{role}|>\n{text}<|end|>\n"
        for role, text in (("system", "In French."), ("user", "Hi"), ("assistant", "Hello"))
    )
    assert triple[0] == TURN.replace("<s>", f"<s>{spoken}")


def test_argillas_orca_keeps_its_system_text():
    system = {"system": "In French.", "input": Q, **SIDES}
    (triple, other), _ = made([system, system | {"system": ""}])
    assert triple[0] == TURN.replace("<s>", "<s><|system|>\nIn French.<|end|>\n")
    assert other[0] == TURN


HISTORY = "<s><|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"


@pytest.mark.parametrize("kind", ["preferences", "one answer a row"])
def test_turns_of_helpsteer2_are_messages(kind):
    prompt = f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{Q}"
    both = {"prompt": prompt, "response_1": BAD, "response_2": GOOD, "preference_strength": 2}
    one = [{"prompt": prompt, "response": r, "helpfulness": h} for r, h in ((BAD, 1), (GOOD, 4))]
    texts, _ = made([both] if kind == "preferences" else one)
    expected = HISTORY + TURN.removeprefix("<s>")
    assert texts == [(expected, f"{GOOD}<|end|>", f"{BAD}<|end|>")]


def test_an_arenas_conversations_end_with_the_judged_turn():
    """Both of MT-Bench's go on after the first turn, whichever was judged."""
    talks = [[user("Hi"), bot(answer), user(Q), bot(answer)] for answer in (GOOD, BAD)]
    row = {"winner": "model_a", "conversation_a": talks[0], "conversation_b": talks[1]}
    texts, _ = made([row | {"turn": turn} for turn in (1, 2, None)])
    assert texts[0][1:] == (f"{GOOD}<|end|>", f"{BAD}<|end|>")
    assert texts[1] == texts[2]
    assert texts[1][1].count(GOOD) == 2
    others = [row | {"winner": name} for name in ("model_b", "tie (bothbad)", "both_bad", "A")]
    _, lines = made(others)
    assert "2 no preference" in lines
    assert "wrong type (winner is 'A', neither model_a nor model_b)" in lines


def test_steps_of_step_dpo_before_the_answers_are_in_the_prompt():
    row = {"prompt": Q, "initial_reason_steps": "Step 1: no.\nStep 2:", **SIDES}
    row |= {"chosen": f" {GOOD}", "rejected": f" {BAD}", "full_chosen": "x"}
    (triple, other), _ = made([row, row | {"initial_reason_steps": "", "chosen": GOOD}])
    assert triple == (TURN + "Step 1: no.\nStep 2:", f" {GOOD}<|end|>", f" {BAD}<|end|>")
    assert other[:2] == (TURN, f"{GOOD}<|end|>")


def test_columns_may_have_any_name_and_json_text_is_read():
    row = {"q": json.dumps([user(Q)]), "good": json.dumps([bot(GOOD)]), "bad": BAD, "prompt": "x"}
    texts, _ = made([row], columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert texts == [(TURN, f"{GOOD}<|end|>", f"{BAD}<|end|>")]
    with pytest.raises(UserError, match="has no column 'ask'"):
        made([row], columns={"prompt": "ask"})


@pytest.mark.parametrize("column", ["query", "input", "context"])
def test_a_prompt_under_an_unknown_name_is_an_error_that_names_it(column):
    with pytest.raises(UserError, match=f"columns: {{prompt: {column}}}"):
        made([{column: Q, "chosen": "It is so.", "rejected": "It is not."}])
    whole = {"chosen": [user(Q), bot(GOOD)], "rejected": [user(Q), bot(BAD)], column: "source"}
    assert made([whole])[0] == [(TURN, f"{GOOD}<|end|>", f"{BAD}<|end|>")]


def test_a_prompt_of_messages_under_any_name_is_an_error_that_names_it():
    row = {"trajectory": [{"from": "human", "value": Q}], "source": "x", **SIDES}
    with pytest.raises(UserError, match="prompt: trajectory"):
        made([row | {"chosen": "Step 1: yes", "rejected": "Step 1: no"}])
    row |= {"trajectory": json.dumps([user(Q)])}
    assert made([row], columns={"prompt": "trajectory"})[0] == [
        (TURN, f"{GOOD}<|end|>", f"{BAD}<|end|>")
    ]


def test_a_question_beside_whole_conversations_is_theirs_already():
    sides = {
        name: [{"role": "system", "content": "Be."}, user(f"{Q} "), bot(a)]
        for name, a in SIDES.items()
    }
    texts, _ = made([{"instruction": Q, **sides}])
    assert texts == made([sides])[0]


def test_the_answer_at_the_end_of_a_conversation_is_no_part_of_the_prompt():
    for talk in ([user(Q), bot(GOOD)], [user(Q)]):
        texts, _ = made([{"conversations": talk, **SIDES}])
        assert texts == [(TURN, f"{GOOD}<|end|>", f"{BAD}<|end|>")]


def test_media_are_refused_and_empty_columns_of_them_are_not():
    row = {"prompt": [user(Q)], "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}
    with pytest.raises(UserError, match="put the images themselves into its column images"):
        made([row | {"images": ["cat.png"]}])
    assert "nothing reads its columns images" in made([row | {"images": []}])[1]
    mixed = Dataset.from_list([row | {"images": ["cat.png"]}, row | {"images": []}])
    assert len(made(mixed.filter(lambda each: not each["images"]))[0]) == 1
    with pytest.raises(UserError, match="content that is not text"):
        made([row | {"prompt": [user([{"type": "image"}, {"type": "text", "text": Q}])]}])


def test_data_in_another_format_is_read_as_it_is():
    raw = Dataset.from_list([{"prompt": Q, **SIDES}])
    assert made(raw.with_format("numpy"))[0] == made(raw)[0]
    raw.set_transform(lambda batch: batch)
    with pytest.raises(UserError, match=r"\.map"):
        made(raw)


def test_reference_columns_follow_their_rows_and_sides():
    rows = [{"prompt": "a", "chosen": " yes", "rejected": f" {i}"} for i in range(3)]
    rows[1]["chosen"] = rows[1]["rejected"]
    raw = Dataset.from_list(rows).add_column("reference_chosen_logps", [-1.0, -2.0, -3.0])
    raw = raw.add_column("reference_rejected_logps", [-4.0, -5.0, -6.0])
    pairs, report = tokenize_pairs(raw, tiny_tokenizer(), DataSettings(flip=1.0))
    assert np.allclose(pairs["reference_chosen_logps"][:], [-4.0, -6.0])
    assert np.allclose(pairs["reference_rejected_logps"][:], [-1.0, -3.0])
    assert "log-probs are its columns" in "".join(report.lines())


def test_tools_and_kwargs_of_the_run_reach_the_template_and_the_key():
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
        "{{ m.content }}{{ mark }}{% endfor %}"
    )
    tokenizer = tiny_tokenizer(template)
    raw = Dataset.from_list([{"prompt": [user(Q)], "chosen": [bot(GOOD)], "rejected": [bot(BAD)]}])
    shown = []
    for mark in ("one", "two"):
        settings = DataSettings(chat_template_kwargs={"mark": mark}, tools=[{"name": "look"}])
        pairs, _ = tokenize_pairs(raw, tokenizer, settings)
        shown.append(str(tokenizer.decode(pairs[0]["prompt_ids"])))
    assert shown == [f'{{"name": "look"}}{Q}one', f'{{"name": "look"}}{Q}two']
    for tools in ([{"name": "look"}], ['{"name": "look"}'], '[{"name": "look"}]'):
        pairs, _ = tokenize_pairs(raw.add_column("tools", [tools]), tokenizer)
        assert tokenizer.decode(pairs[0]["prompt_ids"]) == f'{{"name": "look"}}{Q}'


def test_nulls_go_at_every_depth_but_not_from_lists():
    assert without_nulls({"a": [None, {"b": None, "c": {}}]}) == {"a": [None, {"c": {}}]}


def test_text_columns_that_hold_something_else_skip_their_row():
    rows = [
        {"prompt": Q, "system": json.dumps({"a": 1}), **SIDES},
        {"instruction": Q, "input": 3, **SIDES},
        {"prompt": Q, "system": ["Be brief."], **SIDES},
    ]
    texts, _ = made(rows[:1])
    assert len(texts) == 1
    for row in rows[1:]:
        with pytest.raises(UserError, match="not text"):
            made([row])


def test_blank_arguments_of_a_table_are_none():
    rows = [{"prompt": Q, "tools": "", "chat_template_kwargs": "null", **SIDES}]
    assert len(made(rows)[0]) == 1
