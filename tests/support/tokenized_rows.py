"""Raw rows through `PairTokenizer` with the tiny tokenizer, and their tokens as text."""

from __future__ import annotations

from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import FLAGS, Limits

from tests.support.pair_rows import Row, bot, user
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer

LOOSE = Limits(None, None, None, "keep_end")


BOS, EOS, END = 0, 1, 3


ASK = [user("Is water wet?")]


YES, NO = [bot("yes, it is")], [bot("no")]


SAME_PAIR: dict[str, Row] = {
    "messages": {"prompt": ASK, "chosen": YES, "rejected": NO},
    "whole conversations after a prompt of messages": {
        "prompt": ASK,
        "chosen": ASK + YES,
        "rejected": ASK + NO,
    },
    "whole conversations after a text (UltraFeedback)": {
        "prompt": "Is water wet?",
        "chosen": ASK + YES,
        "rejected": ASK + NO,
    },
    "implicit prompt": {"chosen": ASK + YES, "rejected": ASK + NO},
    "empty prompt": {"prompt": [], "chosen": ASK + YES, "rejected": ASK + NO},
    "prompt text with answer messages": {"prompt": "Is water wet?", "chosen": YES, "rejected": NO},
    "prompt messages with answer texts": {"prompt": ASK, "chosen": "yes, it is", "rejected": "no"},
    "messages with empty fields, as Arrow fills them": {
        "prompt": [{**ASK[0], "tool_calls": None}],
        "chosen": [{**YES[0], "tool_calls": None}],
        "rejected": NO,
    },
}


def tokenize(
    *raw: Row, template: str | None = WITH_BOS, limits: Limits = LOOSE, adds_bos: bool = True
) -> list[Row]:
    tokenizer = tiny_tokenizer(template, adds_bos)
    columns = PairTokenizer(tokenizer, limits)(
        {name: [row[name] for row in raw] for name in raw[0]}
    )
    done = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        row | {"flags": {f for i, f in enumerate(FLAGS) if row["flags"] >> i & 1}} for row in done
    ]


def ids(row: Row) -> tuple[list[int], list[int], list[int]]:
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]


def text(token_ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(token_ids))
