"""``chat_rendering: separate``: pairs as the published SimPO, LMPO and gamma-PO scripts made them.

What they did (princeton-nlp/SimPO, ``run_simpo.py`` and ``simpo_trainer.py``; the others took it
over), row by row:

- The prompt's messages are rendered without a generation prompt, each answer as a conversation of
  its own, less its BOS. So an answer brings what opens its turn (``<|im_start|>assistant``), and is
  scored on it; a default system prompt of the template comes with it too.
- Without a prompt of messages, a conversation's last message is the answer and the rest the prompt.
- Prompt and prompt + answer are tokenized. The answer's tokens are those past the length of the
  prompt's, one earlier where the two differ, since a last token can merge with the answer.
- BOS is put in front unless it is there, EOS at the end unless it is there.

Where chosen and rejected merge with the prompt's end differently, the published trainer kept two
prompts; here they share what is the same, and the row is counted as a prompt mismatch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .chat import Rendered, accepted, render, shared_arguments, without_bos
from .limits import MISMATCH, SEVERAL_TURNS, Tokens
from .rows import Pair, RowProblem, attempt, common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def last_turns(pair: Pair, row: dict[str, Any]) -> Pair:
    """The pair with prompt and answers where the published scripts cut ``row``."""
    if not pair.conversation or (isinstance(row.get("prompt"), list) and row["prompt"]):
        return pair
    prompt = pair.prompt + pair.chosen[:-1]
    return replace(pair, prompt=prompt, chosen=pair.chosen[-1:], rejected=pair.rejected[-1:])


def render_separately(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> list[Rendered | RowProblem]:
    """Prompt, prompt with chosen and prompt with rejected of each pair, as text."""
    arguments = shared_arguments(pairs)
    alone = {name: value for name, value in arguments.items() if name != "tools"}
    prompts, chosen, rejected = (
        render(tokenizer, [getattr(pair, part) for pair in pairs], False, given)
        for part, given in (("prompt", arguments), ("chosen", alone), ("rejected", alone))
    )
    for problem in (side for side in (*chosen, *rejected) if isinstance(side, RowProblem)):
        problem.detail = f"an answer alone, as chat_rendering: separate has it: {problem.detail}"

    def joined(*texts: Any) -> Rendered:
        prompt, *sides = accepted(*texts)
        first, second = (prompt + without_bos(tokenizer, side) for side in sides)
        return prompt, first, second

    return [attempt(joined, *texts) for texts in zip(prompts, chosen, rejected, strict=True)]


def split_separate(
    pair: Pair,
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    bos_id: int | None,
    eos_id: int | None,
) -> Tokens:
    """Prompt and answers from the ids of the three texts `render_separately` gives."""
    size = len(prompt)
    starts = [size if ids[:size] == prompt else max(size - 1, 0) for ids in (chosen, rejected)]
    shared = min(*starts, common_prefix(chosen, rejected))
    flags = {SEVERAL_TURNS} if pair.several_turns else set()
    detail = ""
    if shared < size:
        flags.add(MISMATCH)
        detail = f"the last {size - shared} of {size} prompt tokens are the answers'"
    sides = []
    for side in (chosen[shared:], rejected[shared:]):
        ends = eos_id is None or side[-1:] == [eos_id]
        sides.append(side if ends else [*side, eos_id])
    head = chosen[:shared]
    if bos_id is not None and head[:1] != [bos_id]:
        head = [bos_id, *head]
    return Tokens(head, sides[0], sides[1], flags, detail)
