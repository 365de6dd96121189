"""Values of a sweep: parsed, multiplied, named."""

from __future__ import annotations

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.sweep.values import MOST_IN_NAME, combinations, listed


def test_several_values_vary_and_single_ones_hold_for_all() -> None:
    runs, fixed = combinations(["--learning_rate", "5e-7,1e-6", "--beta=2,2.5", "--seed", "3"])
    assert [run.values for run in runs] == [
        {"learning_rate": "5e-7", "beta": "2"},
        {"learning_rate": "5e-7", "beta": "2.5"},
        {"learning_rate": "1e-6", "beta": "2"},
        {"learning_rate": "1e-6", "beta": "2.5"},
    ]
    assert runs[0].name == "learning_rate-5e-7_beta-2"
    assert runs[3].overrides == ["--learning_rate=1e-6", "--beta=2.5"]
    assert fixed == ["--seed=3"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2,2.5", ["2", "2.5"]),
        ("[train,test],[train]", ["[train,test]", "[train]"]),
        ("{dpo: 0.8, sft: 1},simpo", ["{dpo: 0.8, sft: 1}", "simpo"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("it's", ["it's"]),
    ],
)
def test_commas_part_values_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert listed(text) == values


def test_paths_and_mappings_become_names_of_folders() -> None:
    runs, _ = combinations(["--model_name_or_path", "/models/a b,org/model", "--seed=1,2"])
    assert runs[0].name == "model_name_or_path-models-a-b_seed-1"
    assert runs[2].name == "model_name_or_path-org-model_seed-1"


def test_signs_and_long_values_have_names_of_their_own() -> None:
    runs, _ = combinations(["--alpha", "-0.25,0.25"])
    assert [run.name for run in runs] == ["alpha--0.25", "alpha-0.25"]
    long = "/a/folder/far/down/" + "x" * 60
    names = [run.name for run in combinations([f"--dataset={long}/a,{long}/b"])[0]]
    assert names[0] != names[1]
    assert all(len(name) == len("dataset-") + MOST_IN_NAME for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta=2"], "several values"),
        ([], "several values"),
        (["--beta", "2,2"], "two runs would be called beta-2"),
        (["--objective", "a/b,a:b"], "two runs would be called objective-a-b"),
        (["--beta=2,3", "--beta=4"], "beta: it is given twice"),
        (["--beta"], "--beta: expected"),
        (["--beta", "--seed", "2,3"], "--beta: expected"),
        (["beta=2,3"], "beta: expected"),
        (["--beta=2,"], "beta: .* empty"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combinations(arguments)
