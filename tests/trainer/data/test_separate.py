"""`chat_rendering: separate` gives the ids of the published scripts' procedure, told again here."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import DataSettings, load_pairs, tokenize_pairs
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import FLAGS, MISMATCH, NOTHING_LEFT, OK, Limits
from widemargin.trainer.data.template import read_chat_template

from tests.support.chat_tokenizers import GEMMA2_OPEN, family_tokenizer
from tests.support.pair_rows import Row, bot, user, write
from tests.support.tiny_tokenizers import MERGING, tiny_tokenizer

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LOOSE = Limits(None, None, None, "keep_end")


def published_mistral() -> str:
    """SimPO's template wrote no BOS: its trainer put it there."""
    return read_chat_template("mistral").replace("{{- bos_token -}}", "")


def make(name: str) -> Any:
    templates = {"gemma2": GEMMA2_OPEN, "mistral": published_mistral()}
    templates["mistral, newer file"] = published_mistral()
    if name == "zephyr":  # Mistral's tokenizer; its own template writes no BOS
        return family_tokenizer("mistral", ZEPHYR)
    if name == "tiny, merging":
        return tiny_tokenizer(MERGING)
    if name == "mistral, shipped":
        return family_tokenizer("mistral", read_chat_template("mistral"))
    return family_tokenizer(name, templates.get(name))


FAMILIES = [
    *("qwen2.5", "llama3", "gemma2", "zephyr", "mistral", "mistral, newer file"),
    *("mistral, shipped", "tiny, merging"),
]


def published_ids(
    tokenizer: Any,
    row: Row,
    empty_system: bool,
    max_length: int | None,
    max_prompt_length: int | None,
    keep_end: bool,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of chosen and of rejected, plainly, one after the other."""
    if "prompt" in row:
        asked, answers = row["prompt"], (row["chosen"], row["rejected"])
    else:
        asked, answers = row["chosen"][:-1], (row["chosen"][-1:], row["rejected"][-1:])
    template = tokenizer.chat_template
    mentioned = "system" in template or "<|im_start|>" in template
    if empty_system and mentioned and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": ""}, *asked]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = tokenizer.apply_chat_template(asked, tokenize=False)
    pairs = []
    for answer in answers:
        text = tokenizer.apply_chat_template(answer, tokenize=False)
        if bos is not None and text.startswith(tokenizer.bos_token):
            text = text[len(tokenizer.bos_token) :]
        alone, whole = ids(prompt), ids(prompt + text)
        start = len(alone) if whole[: len(alone)] == alone else len(alone) - 1
        head, side = whole[:start], whole[start:]
        if bos is not None and (not head or head[0] != bos):
            head = [bos, *head]
        if not side or side[-1] != eos:
            side = [*side, eos]
        pairs.append((head, side))
    longer = max(len(side) for _, side in pairs)
    cut = []
    for head, side in pairs:
        if max_length and max_prompt_length and len(head) + longer > max_length:
            head = head[-max_prompt_length:] if keep_end else head[:max_prompt_length]
            if len(head) + longer > max_length:
                side = side[: max_length - max_prompt_length]
        cut.append((head, side))
    return cut


def ours(tokenizer: Any, row: Row, limits: Limits = LOOSE, empty_system: bool = False) -> Row:
    rendering = Rendering(separate=True, empty_system=empty_system)
    columns = PairTokenizer(tokenizer, limits, rendering)({key: [row[key]] for key in row})
    done = {name: values[0] for name, values in columns.items()}
    return done | {"flags": {flag for i, flag in enumerate(FLAGS) if done["flags"] >> i & 1}}


ASK = [user("Is water wet?")]
YES, NO = [bot("Yes, it is.")], [bot("No")]
PAIR = {"prompt": ASK, "chosen": YES, "rejected": NO}

WORDS = st.lists(
    st.sampled_from(["yes", "no", " maybe", "\n", "France", " ", "Is it?", "\n\n", "1984"]),
    min_size=1,
    max_size=8,
).map(lambda words: "a" + "".join(words))


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    texts=st.lists(WORDS, min_size=3, max_size=5),
    empty_system=st.booleans(),
    whole=st.booleans(),
    lengths=st.one_of(st.just((None, None)), st.tuples(st.integers(24, 60), st.integers(2, 20))),
    keep_end=st.booleans(),
)
def test_ids_are_those_of_the_published_procedure(
    family: str,
    texts: list[str],
    empty_system: bool,
    whole: bool,
    lengths: tuple[int | None, int | None],
    keep_end: bool,
) -> None:
    tokenizer = make(family)
    *asked, good, bad = texts
    prompt = [(user if (len(asked) - i) % 2 else bot)(text) for i, text in enumerate(asked)]
    if prompt[0]["role"] == "assistant":
        prompt = [user("?"), *prompt]
    bad += "!"
    row: Row = {"prompt": prompt, "chosen": [bot(good)], "rejected": [bot(bad)]}
    if whole:
        row = {"chosen": [*prompt, bot(good)], "rejected": [*prompt, bot(bad)]}
    limits = Limits(*lengths, None, "keep_end" if keep_end else "keep_start")
    expected = published_ids(tokenizer, row, empty_system, *lengths, keep_end)
    done = ours(tokenizer, row, limits, empty_system)
    if expected[0][1] == expected[1][1]:
        assert done["status"] == "identical sides after truncation"
        return
    assert done["status"] == OK
    assert [
        (done["prompt_ids"], done[f"{side}_ids"]) for side in ("chosen", "rejected")
    ] == expected


def test_the_shipped_mistral_template_gives_the_ids_of_the_published_one() -> None:
    for family in ("mistral", "mistral, newer file"):
        shipped = family_tokenizer(family, read_chat_template("mistral"))
        published = family_tokenizer(family, published_mistral())
        assert ours(shipped, PAIR) == ours(published, PAIR)
        joined: Any = PairTokenizer(shipped, LOOSE)({key: [PAIR[key]] for key in PAIR})
        for part in ("prompt_ids", "chosen_ids"):
            assert joined[part][0] == ours(shipped, PAIR)[part]


def test_answers_bring_what_opens_their_turn() -> None:
    tokenizer = make("llama3")
    done = ours(tokenizer, PAIR)
    assert tokenizer.decode(done["prompt_ids"]).endswith("Is water wet?<|eot_id|>")
    start = "<|start_header_id|>assistant<|end_header_id|>\n\nYes"
    assert tokenizer.decode(done["chosen_ids"]).startswith(start)


def test_an_answer_the_template_refuses_alone_says_what_to_do() -> None:
    done = ours(family_tokenizer("gemma2"), PAIR)
    assert done["status"] == "refused by the chat template"
    assert "an answer alone, as chat_rendering: separate has it" in done["detail"]
    assert "alternate" in done["detail"]


def test_last_messages_are_the_answers_where_no_prompt_is_given() -> None:
    tokenizer = make("llama3")
    more = [user("Sure?"), bot("maybe")]
    done = ours(tokenizer, {"chosen": ASK + YES + more, "rejected": ASK + NO + [more[0], *NO]})
    assert "Yes, it is." in tokenizer.decode(done["prompt_ids"])
    assert "maybe" in tokenizer.decode(done["chosen_ids"])
    text = ours(tokenizer, {**PAIR, "prompt": "Is water wet?"})
    assert text == ours(tokenizer, PAIR)


def test_sides_that_merge_differently_share_what_is_the_same() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [user("no, ye")], "chosen": [bot("s")], "rejected": [bot(" no")]}
    done = ours(tokenizer, row)
    assert done["flags"] == {MISMATCH}
    assert tokenizer.decode(done["prompt_ids"] + done["chosen_ids"]) == "<s>no, yes</s>"
    assert tokenizer.decode(done["prompt_ids"] + done["rejected_ids"]) == "<s>no, ye no</s>"


def test_limits_as_published_may_leave_nothing() -> None:
    done = ours(make("llama3"), PAIR, Limits(8, 8, None, "keep_end"))
    assert done["status"] == NOTHING_LEFT
    long = {**PAIR, "chosen": [bot("yes " * 30)]}
    done = ours(make("llama3"), long, Limits(40, 20, 12, "keep_end"))
    assert (len(done["prompt_ids"]), len(done["chosen_ids"])) == (11, 12)
    done = ours(make("llama3"), long, Limits(30, None, None, "keep_end"))
    assert len(done["prompt_ids"]) + len(done["chosen_ids"]) == 30


def test_plain_text_is_not_rendered_and_stays_as_it_is() -> None:
    row = {"prompt": "Is water wet?", "chosen": " yes", "rejected": " no"}
    columns: Any = PairTokenizer(tiny_tokenizer(), LOOSE)({key: [row[key]] for key in row})
    done = ours(tiny_tokenizer(), row)
    assert [done[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        columns[name][0] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]


def test_settings_reach_the_tokens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw, tokenizer = Dataset.from_list([PAIR]), make("qwen2.5")
    texts = []
    for rendering in ("joint", "separate"):
        for empty in (False, True):
            setting = DataSettings(chat_rendering=rendering, auto_insert_empty_system_msg=empty)
            pairs, _ = tokenize_pairs(raw, tokenizer, setting)
            texts.append(
                [tokenizer.decode(pairs[0][f"{part}_ids"]) for part in ("prompt", "chosen")]
            )
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    empty_start, ask = default.replace("You are a helpful assistant.", ""), "<|im_start|>user\n"
    opened, answer = "<|im_start|>assistant\n", "Yes, it is.<|im_end|>"
    asked = f"{ask}Is water wet?<|im_end|>\n"
    assert texts == [
        [default + asked + opened, answer],
        [empty_start + asked + opened, answer],
        [default + asked, f"{default}{opened}{answer}\n<|im_end|>"],
        [empty_start + asked, f"{default}{opened}{answer}\n<|im_end|>"],
    ]


def test_notes_tell_what_a_rendering_adds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": [bot("maybe")]}])

    def notes(tokenizer: Any, **changes: Any) -> str:
        setting = DataSettings(path, dataset_splits=["train"], **changes)
        return " ".join(load_pairs(setting, tokenizer).report.notes)

    separate = {"chat_rendering": "separate"}
    assert "You are a helpful assistant." in notes(make("qwen2.5"), **separate)
    assert notes(make("qwen2.5")) == notes(make("llama3"), **separate) == ""
    empty = {"auto_insert_empty_system_msg": True}
    assert "refuses" in notes(family_tokenizer("gemma2"), **empty)
    assert "refuses" not in notes(make("gemma2"), **empty)
    assert notes(make("qwen2.5"), **empty) == ""
