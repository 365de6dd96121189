"""The quickstart's data: deterministic, right where it says so, held-out prompts truly held out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from widemargin.trainer.quickstart.data import (
    CAPITALS,
    FAMILIES,
    OPPOSITES,
    PLURALS,
    WORDS,
    Pair,
    make_pairs,
    write_dataset,
)
from widemargin.trainer.quickstart.model import END, VOCAB_SIZE, make_model, make_tokenizer

REPLIES = {
    "addition": r"It is (\d+)\.",
    "larger": r"(\d+) is larger\.",
    "sorting": r"In order: (\d, \d, \d)\.",
    "opposites": r"It is ([a-z]+)\.",
    "plurals": r"The plural is ([a-z]+)\.",
    "capitals": r"It is ([A-Z][a-z]+)\.",
    "letters": r"It has (\d) letters\.",
}


@pytest.fixture(scope="module")
def splits() -> tuple[list[Pair], list[Pair]]:
    return make_pairs(0)


@pytest.fixture(scope="module")
def pairs(splits: tuple[list[Pair], list[Pair]]) -> list[Pair]:
    return splits[0] + splits[1]


def table(text: str) -> dict[str, str]:
    return dict(entry.split() for entry in re.split(r"[|\n]", text))


OPPOSITE_OF = table(OPPOSITES) | {b: a for a, b in table(OPPOSITES).items()}
CAPITAL_OF = table(CAPITALS)
IRREGULAR = table(
    "child children|mouse mice|foot feet|tooth teeth|goose geese|man men|woman women|"
    "person people|ox oxen"
)


def plural(word: str) -> str:
    """English rules, written down here a second time."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in ("leaf", "knife", "wolf"):
        return re.sub(r"fe?$", "ves", word)
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh|ato)$", word) else "s")


def solve(pair: Pair) -> str:
    """The answer, worked out from the prompt."""
    numbers = [int(n) for n in re.findall(r"\d+", pair.prompt)]
    if pair.family == "addition":
        return str(sum(numbers))
    if pair.family == "larger":
        return str(max(numbers))
    if pair.family == "sorting":
        return ", ".join(str(n) for n in sorted(numbers))
    answers = {"opposites": OPPOSITE_OF, "capitals": CAPITAL_OF}.get(pair.family, {})
    known = set(answers or (table(PLURALS) if pair.family == "plurals" else WORDS.split()))
    (word,) = (w for w in re.findall(r"[A-Za-z]+", pair.prompt) if w in known)
    if pair.family == "letters":
        return str(len(word))
    return plural(word) if pair.family == "plurals" else answers[word]


def test_tables_hold_what_is_common_knowledge() -> None:
    known = {"Nepal": "Kathmandu", "Peru": "Lima", "Ghana": "Accra", "Canada": "Ottawa"}
    assert known.items() <= CAPITAL_OF.items()
    assert {"hot": "cold", "poor": "rich", "late": "early"}.items() <= OPPOSITE_OF.items()
    assert len(OPPOSITE_OF) == 2 * len(table(OPPOSITES)), "a word is in two pairs of opposites"
    assert len(set(CAPITAL_OF.values())) == len(CAPITAL_OF)
    assert table(PLURALS) == {word: plural(word) for word in table(PLURALS)}


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_answers_are_right_and_short(family: str, pairs: list[Pair]) -> None:
    mine = [pair for pair in pairs if pair.family == family]
    assert len(mine) >= 150
    for pair in mine:
        found = re.fullmatch(REPLIES[family], pair.chosen)
        assert found, pair
        assert found[1] == solve(pair), pair


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_answers_are_wrong_or_padded(family: str, pairs: list[Pair]) -> None:
    kinds = Counter(pair.kind for pair in pairs if pair.family == family)
    assert 0.3 < kinds["padded"] / kinds.total() < 0.5
    for pair in (pair for pair in pairs if pair.family == family):
        if pair.kind == "wrong":
            found = re.fullmatch(REPLIES[family], pair.rejected)
            assert found, pair
            assert found[1] != solve(pair), pair
        else:
            assert pair.chosen in pair.rejected
            assert len(pair.rejected.split()) >= len(pair.chosen.split()) + 8


def test_same_seed_same_data_and_other_seed_other_data() -> None:
    assert make_pairs(3) == make_pairs(3)
    assert make_pairs(3) != make_pairs(4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_prompts_are_not_in_training(seed: int) -> None:
    train, test = make_pairs(seed)
    prompts = [pair.prompt for pair in train + test]
    assert len(set(prompts)) == len(prompts)
    assert len(test) == 36 * len(FAMILIES)
    assert 1500 < len(train) < 2500
    assert Counter(pair.family for pair in test) == dict.fromkeys(FAMILIES, 36)


def test_a_wrong_answer_is_often_right_elsewhere(pairs: list[Pair]) -> None:
    """So that no answer is worse by itself: a model has to read the question."""
    right = {(pair.family, pair.chosen) for pair in pairs}
    wrong = [(pair.family, pair.rejected) for pair in pairs if pair.kind == "wrong"]
    shared = [pair for pair in wrong if pair in right and pair[0] != "sorting"]
    assert len(shared) / sum(family != "sorting" for family, _ in wrong) > 0.9


def test_written_rows_are_messages(tmp_path: Path, splits: tuple[list[Pair], list[Pair]]) -> None:
    train, test = splits
    write_dataset(tmp_path / "data", train, test)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
    ]
    lines = (tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(train)
    row = json.loads(lines[0])
    assert row == {
        "prompt": [{"role": "user", "content": train[0].prompt}],
        "chosen": [{"role": "assistant", "content": train[0].chosen}],
        "rejected": [{"role": "assistant", "content": train[0].rejected}],
    }


def test_tokenizer_covers_every_text(pairs: list[Pair]) -> None:
    tokenizer = make_tokenizer(pairs)
    assert len(tokenizer) <= VOCAB_SIZE < 2000
    assert tokenizer.unk_token is None
    foreign = Pair("", "wrong", "Wie heißt die Hauptstadt? 東京 🙂", " two  spaces .\n", "<|x|>")
    for pair in [*pairs, foreign]:
        for text in (pair.prompt, pair.chosen, pair.rejected):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
    assert make_tokenizer(pairs).get_vocab() == tokenizer.get_vocab()


def test_template_renders_turns_that_share_the_prompt(pairs: list[Pair]) -> None:
    tokenizer = make_tokenizer(pairs)
    row = Pair("addition", "wrong", "What is 1 + 1?", "It is 2.", "It is 3.").row()
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert prompt == "<|begin|><|user|>What is 1 + 1?<|end|><|assistant|>"
    assert whole == prompt + "It is 2.<|end|>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    longest = max(len(tokenizer(pair.prompt)["input_ids"]) for pair in pairs)
    assert longest + 4 <= 64, "configs/train/quickstart.yaml cuts prompts at 64 tokens"


def test_model_and_tokenizer_agree_and_follow_the_seed(pairs: list[Pair]) -> None:
    import torch

    tokenizer = make_tokenizer(pairs)
    state = torch.random.get_rng_state()
    model, again, other = (make_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
