"""The first pair as the preflight shows it."""

from __future__ import annotations

from typing import Any

import pytest
from widemargin.trainer.data import first_pair
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.first_pair import preflight_lines

from tests.support.chat_tokenizers import family_tokenizer
from tests.support.pair_rows import bot, user
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.tokenized_rows import LOOSE

PAIR = {"prompt": [user("Is water wet?")], "chosen": [bot("Yes, it is.")], "rejected": [bot("No")]}


def test_preflight_shows_roles_and_counts() -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("Is water wet?")["input_ids"]
    row = {"prompt_ids": prompt, "chosen_ids": [3], "rejected_ids": [5, 3]}
    lines = preflight_lines(row, tokenizer)
    assert lines[0] == (
        f"first pair: prompt {len(prompt)} tokens (read, not scored), chosen 1 tokens (scored), "
        "rejected 2 tokens (scored)"
    )
    assert lines[1] == "BOS '<s>' in the prompt: 1"
    assert lines[2].startswith(f"completions start at position {len(prompt)}, after")
    assert lines[4].split() == ["prompt", "0", "0", "-", "special", "'<s>'"]
    last = ["rejected", str(len(prompt) + 1), "3", "yes", "special", "'<|end|>'"]
    assert lines[-1].split() == last
    assert len(lines) == 4 + len(prompt) + 3


def test_preflight_leaves_out_the_middle_of_long_parts(monkeypatch) -> None:
    row = {"prompt_ids": [0] * 50, "chosen_ids": [3] * 4, "rejected_ids": [3] * 5}
    monkeypatch.setattr(first_pair, "MOST_TOKENS", 4)
    lines = preflight_lines(row, tiny_tokenizer())
    assert [line.split()[1] for line in lines[4:9]] == ["0", "1", "...", "48", "49"]
    assert "46 more tokens" in lines[6]
    assert len(lines) == 4 + 5 + 4 + 5


@pytest.mark.parametrize("text", ["\x1b[31mred\r\n", "‮tfel", "\x00\x07", "é€"])
def test_preflight_cannot_steer_a_terminal(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    for line in preflight_lines(
        {"prompt_ids": ids, "chosen_ids": [3], "rejected_ids": [5]}, tokenizer
    ):
        assert line.isprintable()


def test_preflight_shows_where_completions_start_and_what_is_special() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    starts = []
    for separate in (False, True):
        columns: Any = PairTokenizer(tokenizer, LOOSE, Rendering(separate))(
            {key: [PAIR[key]] for key in PAIR}
        )
        row = {name: values[0] for name, values in columns.items()}
        lines = preflight_lines(row, tokenizer)
        starts.append(next(line for line in lines if line.startswith("completions start")))
        ends = [line.split() for line in lines if line.endswith("'<|im_end|>'")]
        assert all(line[-2] == "special" for line in ends)
        assert len(row["prompt_ids"]) == int(starts[-1].split()[4].strip(","))
    assert "assistant\\n': chosen with 'Yes" in starts[0]
    assert "<|im_end|>\\n': chosen with '<|im_start|>system" in starts[1]
