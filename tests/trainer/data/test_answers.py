"""Rows with several answers: the pairs that their scores make, and the trees they run as."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.formats.answers import Edges
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, make_rows, user
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
Q = "Is water wet?"
ANSWERS, SCORES = ["no", "yes, it is", "maybe", "yes"], [1.0, 9.0, 5.0, 9.0]
OURS = {"prompt": Q, "completions": ANSWERS, "scores": SCORES}
KNOWN = {
    "scores": {"prompt": [user(Q)], "completions": [[bot(a)] for a in ANSWERS], "scores": SCORES},
    "ranks": {
        "prompt": [user(Q)], "completions": [[bot(a)] for a in ANSWERS], "ranks": [4, 1, 2, 1],
    },
    "UltraFeedback": {
        "instruction": Q,
        "completions": [
            {"response": a, "overall_score": s} for a, s in zip(ANSWERS, SCORES, strict=True)
        ],
    },
    "Nectar": {
        "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
        "answers": [{"answer": a, "rank": 10 - s} for a, s in zip(ANSWERS, SCORES, strict=True)],
    },
    "SimPO": {"prompt": Q, "all_generated_responses": ANSWERS, "all_rm_scores": SCORES},
    "RRHF": {"query": Q, "responses": ANSWERS, "scores": SCORES},
    "distilabel": {"instruction": Q, "generations": ANSWERS, "ratings": SCORES},
    "NCA": {
        "prompt": Q,
        **{f"A{i}": answer for i, answer in enumerate(ANSWERS)},
        **{f"A{i}_score": score for i, score in enumerate(SCORES)},
    },
}  # fmt: skip


def made(rows, **settings):
    """(chosen, rejected) texts, the report's lines, and the settings as they are after."""
    tokenizer, given = tiny_tokenizer(), DataSettings(**settings)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    pairs, report = tokenize_pairs(data, tokenizer, given)
    names = ("chosen_ids", "rejected_ids")
    texts = [
        tuple(str(tokenizer.decode(row[n], skip_special_tokens=True)) for n in names)
        for row in pairs
    ]
    return texts, "\n".join(report.lines()), pairs, given


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_give_the_best_against_every_worse_one(name):
    texts, lines, pairs, settings = made([KNOWN[name] | {"id": 3}])
    assert sorted(texts) == [("yes, it is", "maybe"), ("yes, it is", "no")]
    assert "read as " in lines
    assert "2 pairs of 1 rows, 0 skipped" in lines
    assert settings.group_by_prompt is True
    assert "group_by_prompt: true" in lines
    assert len(PairRows(pairs, group_by_prompt=True).trees) == 1  # pyright: ignore


def test_the_best_come_first_where_nothing_scores_them():
    texts, *_ = made([{"prompt": Q, "responses": ["yes", "maybe", "no"]}])
    assert texts == [("yes", "maybe"), ("yes", "no")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"edges": "best-vs-rest"}, [(9, 1), (9, 5)]),
        ({"edges": "best-worst"}, [(9, 1)]),
        ({"edges": "adjacent"}, [(9, 5), (5, 1)]),
        ({"edges": "all"}, [(9, 5), (9, 1), (9, 5), (9, 1), (5, 1)]),
        ({"edges": "above-gap", "edge_gap": 5.0}, [(9, 1), (9, 1)]),
    ],
)
def test_edges(settings, expected):
    _, _, pairs, _ = made([OURS], **settings)
    scores = zip(pairs["score_chosen"][:], pairs["score_rejected"][:], strict=True)
    assert sorted(scores) == sorted(expected)


def test_rows_without_a_preference_are_skipped_and_counted():
    rows = [
        OURS,
        OURS | {"scores": [2.0] * 4},
        OURS | {"scores": [2.0] * 3},
        OURS | {"completions": [], "scores": []},
        OURS | {"scores": [float("nan"), 1.0, 2.0, 3.0]},
        OURS | {"scores": [None, None, 1.0, 2.0]},
    ]
    texts, lines, *_ = made(rows)
    assert texts == [("yes, it is", "maybe"), ("yes, it is", "no"), ("yes", "maybe")]
    assert "3 pairs of 6 rows, 4 skipped" in lines
    assert "4 answers, none better than another" in lines
    assert "completions has 4 answers and scores 3" in lines
    assert "row 3 of" in lines or "no answer has a score" in lines
    assert "scores has nan, no finite number" in lines or "and 1 more" in lines


def test_a_pair_beside_the_answers_wins_unless_edges_are_named():
    row = KNOWN["SimPO"] | {"chosen": "yes", "rejected": "no"}
    texts, lines, _, settings = made([row])
    assert texts == [("yes", "no")]
    assert "nothing reads its columns all_generated_responses, all_rm_scores" in lines
    assert settings.group_by_prompt is False
    assert vars(settings)["filled_in"] == {"group_by_prompt": False}
    texts, *_ = made([row], edges="best-worst")
    assert texts == [("yes, it is", "no")]


def test_pairs_keep_the_order_of_rows_and_say_which_row_they_are_of():
    rows = [OURS | {"completions": [f"{i}", f"{i}0"], "scores": [2.0, 1.0]} for i in range(5)]
    rows[3] = OURS | {"completions": ["same", "same"], "scores": [2.0, 1.0]}
    rows[1] = OURS | {"completions": ["1", "10", "11"], "scores": [2.0, 1.0, 0.0]}
    texts, lines, *_ = made(rows)
    assert texts == [("0", "00"), ("1", "10"), ("1", "11"), ("2", "20"), ("4", "40")]
    assert "row 3 of train_dataset: identical sides" in lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edges": "best"}, "edges: "),
        ({"edge_gap": 1.0}, "set edges: above-gap to use it; no edges are given"),
        ({"edges": "above-gap", "edge_gap": -1.0}, "edge_gap: expected"),
        ({"group_by_prompt": 1}, "group_by_prompt: expected"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        DataSettings(**settings).check()


def test_ties_make_no_pair():
    assert Edges("all").of([(1.0, "a"), (1.0, "b"), (0.0, "c")]) == [
        ((1.0, "a"), (0.0, "c")), ((1.0, "b"), (0.0, "c"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("yes", "no mapping"),
        ({"response": "b", "overall_score": "high"}, "overall_score has something"),
    ],
)
def test_an_answer_that_cannot_be_read_skips_its_row(answer, reason):
    rows = [KNOWN["UltraFeedback"], {"instruction": Q, "completions": [answer]}]
    rows = [row | {"completions": json.dumps(row["completions"])} for row in rows]
    _, lines, pairs, _ = made(rows)
    assert len(pairs) == 2
    assert "1 skipped" in lines
    assert reason in lines


def test_scores_may_be_text_and_none_of_them_is_dropped_in_silence():
    row = {"instruction": Q, "completions": [
        {"response": a, "overall_score": str(s)} for a, s in zip(ANSWERS, SCORES, strict=True)
    ]}  # fmt: skip
    assert made([row])[0] == made([KNOWN["UltraFeedback"]])[0]


def test_edges_say_where_they_have_no_effect():
    pair = {"prompt": Q, "chosen": "yes", "rejected": "no"}
    assert "edges has no effect" in made([pair], edges="adjacent")[1]
    assert "edges has no effect" not in made([OURS], edges="adjacent")[1]


def test_a_score_may_be_missing_where_nothing_uses_it():
    """As in a file of two data sets of which one has scores."""
    rows = make_rows(2)
    rows[0] |= {"score_chosen": 2.0, "score_rejected": 1.0}
    data = Dataset.from_list(rows)
    pairs, report = tokenize_pairs(data, tiny_tokenizer())
    assert len(pairs) == 2
    assert "only margin_from: scores and listwise objectives use it" in "\n".join(report.lines())
    with pytest.raises(UserError, match="margin_from: 1 of 2 pairs of train_dataset lack"):
        tokenize_pairs(data, tiny_tokenizer(), DataSettings(margin_from="scores"))


def test_answers_are_compared_by_scores_of_one_scale():
    """UltraFeedback's fine-grained scores go to 5, its overall ones to 10."""
    answers = [
        {"response": "no", "fine-grained_score": None, "overall_score": 6.0},
        {"response": "yes", "fine-grained_score": 4.5, "overall_score": 8.0},
    ]
    pairs, _ = tokenize_pairs(
        Dataset.from_list([{"instruction": Q, "completions": answers}]), tiny_tokenizer()
    )
    assert [str(tiny_tokenizer().decode(ids)) for ids in pairs["chosen_ids"]] == ["yes<|end|>"]
