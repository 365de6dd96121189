"""The first pair, token by token: the text the model reads and the tokens it is scored on.

Only `preflight` uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..text import printable
from .chat import PROBE, Rendering, only_id
from .encoding import PairTokenizer
from .formats.answers import DESIRABLE
from .limits import OK, Limits
from .table import PARTS, UNSCORED_COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 24
"""Of a part that are shown."""

_GREEN, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
#: Tokens shown on each side of a completion's start.
_AROUND = 6
#: First tokens of a conversation that are compared with the published scripts'.
_FIRST = 6


def preflight_lines(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    colours: bool = False,
) -> list[str]:
    """One tokenized pair as readable text, one line per token.

    ``row`` has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, and where not all of an answer
    is scored ``chosen_unscored`` and ``rejected_unscored``. With ``colours`` the scored tokens are
    green, for a terminal. Of a part with more than
    `MOST_TOKENS` tokens only the beginning and the end are shown.
    """
    parts = PARTS[:2] if DESIRABLE in row else PARTS  # a single answer stands on both sides
    ids: dict[str, Sequence[int]] = {part: row[f"{part}_ids"] for part in parts}
    left = [row.get(name, ()) for name in UNSCORED_COLUMNS]
    unscored = {"prompt": range(len(ids["prompt"])), "chosen": left[0], "rejected": left[1]}
    counts = ", ".join(
        f"{part} {len(ids[part])} tokens ({_share(len(ids[part]), len(unscored[part]))})"
        for part in parts
    )
    lines = [f"first pair: {counts}"]
    bos_id = only_id(tokenizer.bos_token_id)
    if bos_id is not None:
        count = list(ids["prompt"]).count(bos_id)
        lines.append(f"BOS {_shown(tokenizer, bos_id)} in the prompt: {count}")
    before = _text(tokenizer, ids["prompt"][-_AROUND:])
    after = (_text(tokenizer, ids[side][:_AROUND]) for side in parts[1:])
    begins = ", ".join(f"{side} with {text}" for side, text in zip(parts[1:], after, strict=True))
    lines.append(f"completions start at position {len(ids['prompt'])}, after {before}: {begins}")
    lines.append(f"{'part':<9}{'position':>9}{'id':>9}  {'scored':<7} {'kind':<8} text")
    for part in parts:
        offset = 0 if part == "prompt" else len(ids["prompt"])
        out = set(unscored[part])
        kept = [i not in out for i in range(len(ids[part]))]
        part_lines = _part_lines(part, ids[part], offset, kept, tokenizer)
        for line, scored in part_lines:
            colour = _GREEN if scored else _DIM
            lines.append(f"{colour}{line}{_PLAIN}" if colours else line)
    return lines


def first_tokens_line(
    tokenizer: PreTrainedTokenizerBase, published: PreTrainedTokenizerBase, rendering: Rendering
) -> str | None:
    """How a conversation begins, and how the published scripts began it, if they could.

    ``published`` is the tokenizer with the template that they would have taken.
    """
    if not (tokenizer.chat_template and published.chat_template):
        return None
    said = Rendering(separate=True, empty_system=True)
    pairs = ((tokenizer, rendering), (published, said))
    ours, theirs = (_example_ids(each, how)[:_FIRST] for each, how in pairs)
    if not ours or not theirs:
        return None
    shown = " ".join(_raw(tokenizer, i) for i in ours)
    if ours == theirs:
        return f"a conversation about {PROBE} begins with {shown}, as in the published scripts"
    return (
        f"a conversation about {PROBE} begins with {shown}; in the published scripts with "
        f"{' '.join(_raw(published, i) for i in theirs)} (their twins, -m widemargin.trainer."
        "run_simpo and so on, do)"
    )


def _example_ids(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[int]:
    row = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    texts = {"prompt": PROBE, "chosen": "yes", "rejected": "no"}
    batch = {part: [[{"role": row[part], "content": texts[part]}]] for part in PARTS}
    done = PairTokenizer(tokenizer, Limits(None, None, None, "keep_end"), rendering)(batch)
    return list(done["prompt_ids"][0]) if done["status"][0] == OK else []


def _raw(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return f"'{printable(str(tokenizer.convert_ids_to_tokens(token_id)))}'"


def _part_lines(
    part: str,
    ids: Sequence[int],
    offset: int,
    scored: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[str, bool]]:
    hidden = range(0)
    if len(ids) > MOST_TOKENS:
        hidden = range(MOST_TOKENS // 2, len(ids) - MOST_TOKENS // 2)
    for i, token_id in enumerate(ids):
        if hidden and i == hidden.start:
            yield f"{part:<9}{'...':>9}{'':>9}  {'':<16} {len(hidden)} more tokens", False
        if i not in hidden:
            mark = "yes" if scored[i] else "-"
            kind = "special" if _is_special(tokenizer, token_id) else ""
            text = _shown(tokenizer, token_id)
            line = f"{part:<9}{offset + i:>9}{token_id:>9}  {mark:<7} {kind:<8} {text}"
            yield line, scored[i]


def _share(tokens: int, unscored: int) -> str:
    if unscored == tokens:
        return "read, not scored"
    return f"{tokens - unscored} of them scored" if unscored else "scored"


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return token_id in tokenizer.all_special_ids or (added is not None and added.special)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Several tokens' text, quoted and escaped."""
    return f"'{printable(str(tokenizer.decode([int(i) for i in ids])))}'"


def _shown(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token's text, quoted and escaped; of one that is no whole character, its raw form."""
    text = tokenizer.decode([int(token_id)])
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(int(token_id)) or ""
    return f"'{printable(str(text))}'"
