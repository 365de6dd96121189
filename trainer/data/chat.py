"""Chat templates: how one renders prompts and answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .rows import Messages, Pair, RowProblem, attempt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..settings.data import DataSettings

TEMPLATE_REFUSED = "refused by the chat template"
SYSTEM_LOST = "system text that the template writes before no answer"
Rendered = tuple[str, str, str]
"""A pair as text: its prompt, the prompt with chosen, the prompt with rejected."""

PROBE = "PROBE"
"""An answer's text, to see what templates write around one."""
NOTHING: Mapping[str, Any] = {}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendering:
    """The settings that decide which text a conversation becomes; see `DataSettings`."""

    separate: bool = False
    empty_system: bool = False
    score: str = "completion"
    #: What the template is given beside the messages, for rows that do not say otherwise.
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: DataSettings) -> Rendering:
        separate = settings.chat_rendering == "separate"
        tools = {"tools": settings.tools} if settings.tools else {}
        arguments = settings.chat_template_kwargs | tools
        return cls(separate, settings.auto_insert_empty_system_msg, settings.score, arguments)


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Messages],
    generation: bool,
    arguments: Mapping[str, Any] = NOTHING,
) -> list[str | RowProblem]:
    """Each conversation as text; one the template raises on becomes a ``RowProblem``.

    ``arguments`` are the template's own: ``tools``, ``enable_thinking`` and the like.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds messages but the tokenizer has no chat template; set chat_template: to "
            "a Jinja template or its path, or start from a model that has one"
        )
    try:
        texts: Any = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=generation, **arguments
        )
        return texts
    except Exception as error:  # a template can raise anything on a row it was not written for
        if len(conversations) == 1:
            return [RowProblem(TEMPLATE_REFUSED, f"{type(error).__name__}: {error}")]
    return [render(tokenizer, [each], generation, arguments)[0] for each in conversations]


def example_prompt(tokenizer: PreTrainedTokenizerBase, generation: bool) -> str | None:
    """A short rendered prompt, to see what this template's prompts end with."""
    prompt = [{"role": "user", "content": PROBE}]
    text = render(tokenizer, [prompt], generation)[0]
    return text if isinstance(text, str) else None


def takes_empty_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template mentions system messages and does not refuse them."""
    if not mentions_system(tokenizer):
        return False
    probe = [{"role": "system", "content": ""}, {"role": "user", "content": PROBE}]
    return isinstance(render(tokenizer, [probe], generation=False)[0], str)


def mentions_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The alignment handbook's test for a template that has a place for system messages."""
    template = tokenizer.get_chat_template()
    return "system" in template or "<|im_start|>" in template


def answer_preamble(tokenizer: PreTrainedTokenizerBase) -> str | RowProblem:
    """The text a template writes before an answer rendered alone, and not after its question.

    "" for most, a default system prompt for some; ``RowProblem`` where it refuses such an answer.
    BOS is left out.
    """
    answer = {"role": "assistant", "content": PROBE}
    ask = {"role": "user", "content": "?"}
    alone, joint = render(tokenizer, [[answer], [ask, answer]], generation=False)
    if isinstance(alone, RowProblem):
        return alone
    alone = without_bos(tokenizer, alone)
    if isinstance(joint, RowProblem) or PROBE not in joint:
        return ""
    ends = (len(alone) - i for i in range(len(alone) + 1) if joint.endswith(alone[i:]))
    return alone[: len(alone) - next(ends)]


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without the BOS it may begin with."""
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def plain_text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens the tokenizer itself puts before plain text (BOS, for those that do)."""
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    dressed = tokenizer(PROBE)["input_ids"]
    starts = (i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
    return dressed[: next(starts, 0)]


def template_writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a rendered conversation begins with BOS."""
    rendered = example_prompt(tokenizer, generation=True)
    return rendered is not None and rendered.startswith(str(tokenizer.bos_token))


def only_id(token_id: Any) -> int | None:
    """A special token's id, as ``tokenizer.bos_token_id`` and the like give it."""
    return token_id if isinstance(token_id, int) else None


def pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """The id to pad with: the tokenizer's, or 0 where the model has no row for that one.

    Padding is masked, so any token of the model's will do.
    """
    token_id: Any = tokenizer.pad_token_id
    if token_id is None:
        raise UserError("processing_class: the tokenizer has no padding token; set pad_token")
    return token_id if token_id < vocab_size else 0


def render_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]
) -> list[Rendered | RowProblem]:
    """Each pair as one conversation a side, the prompt with the generation prompt.

    All have the same arguments of the template.
    """
    given = shared_arguments(pairs)
    prompts = render(tokenizer, [pair.prompt for pair in pairs], True, given)
    chosen = render(tokenizer, [pair.prompt + pair.chosen for pair in pairs], False, given)
    rejected = render(tokenizer, [pair.prompt + pair.rejected for pair in pairs], False, given)
    texts = zip(pairs, prompts, chosen, rejected, strict=True)
    return [attempt(_joint, tokenizer, *each) for each in texts]


def _joint(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, prompt: str | RowProblem, *sides: Any
) -> Rendered:
    texts = accepted(_begun(tokenizer, pair) if pair.begun else prompt, *sides)
    if not _loses_system(pair, texts):
        return texts
    return accepted(*_with_folded_system(tokenizer, pair, texts[0]))


def accepted(prompt: str | RowProblem, chosen: Any, rejected: Any) -> Rendered:
    """The texts; raises the first that the template has refused."""
    for text in (prompt, chosen, rejected):
        if isinstance(text, RowProblem):
            raise text
    return str(prompt), chosen, rejected


def shared_arguments(pairs: list[Pair]) -> Mapping[str, Any]:
    """What the template is given beside the messages of ``pairs``, which are alike in it."""
    return pairs[0].arguments if pairs else NOTHING


def _begun(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> str | RowProblem:
    """The prompt with the answer it has begun, left open."""
    try:
        talk = [*pair.prompt, pair.begun or {}]
        text: Any = tokenizer.apply_chat_template(
            talk, tokenize=False, continue_final_message=True, **pair.arguments
        )
        return text
    except Exception as error:  # also where the template changes the answer's text
        return RowProblem(TEMPLATE_REFUSED, f"a begun answer: {type(error).__name__}: {error}")


def _loses_system(pair: Pair, texts: Rendered) -> bool:
    """Whether the template writes the system text in the prompt, but not before an answer."""
    system = pair.prompt[0].get("content") if pair.prompt[0]["role"] == "system" else None
    text = system.strip() if isinstance(system, str) else ""
    return bool(text) and text in texts[0] and not (text in texts[1] and text in texts[2])


def _with_folded_system(tokenizer: PreTrainedTokenizerBase, pair: Pair, prompt: str) -> list[Any]:
    """The texts with the system message inside the prompt's last user message; ``pair`` too.

    Templates of Mistral's write it there only while that message is the last one. It is folded in
    if that gives the very prompt that the template writes, and refused if not.
    """
    asked = max((i for i, m in enumerate(pair.prompt) if m["role"] == "user"), default=0)
    system, question = (str(pair.prompt[i].get("content")).strip() for i in (0, asked))
    between = prompt[prompt.rindex(system) + len(system) :].partition(question)[0]
    folded = {**pair.prompt[asked], "content": system + between + question}
    messages = [*pair.prompt[1:asked], folded, *pair.prompt[asked + 1 :]]
    trial = replace(pair, prompt=messages)
    if asked:
        before = render(tokenizer, [messages], True, pair.arguments)[0]
        if (_begun(tokenizer, trial) if trial.begun else before) == prompt:
            pair.prompt = messages
            sides = [messages + pair.chosen, messages + pair.rejected]
            return [prompt, *render(tokenizer, sides, False, pair.arguments)]
    raise RowProblem(
        SYSTEM_LOST, "put it into the first user message, or give another chat_template"
    )


def generation_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    ids: list[int],
    arguments: Mapping[str, Any] = NOTHING,
) -> list[bool] | None:
    """Which of ``ids`` the template's ``{% generation %}`` marks enclose; None without marks."""
    if not _GENERATION.search(tokenizer.get_chat_template()):
        return None
    encoded: Any = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **arguments,
    )
    extra = len(encoded["input_ids"]) - len(ids)  # a BOS that is there twice
    if extra < 0 or encoded["input_ids"][extra:] != ids:
        return None
    return [bool(mark) for mark in encoded["assistant_masks"][extra:]]


def template_notes(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, end_id: int | None
) -> list[str]:
    """Notes for the report where the template, with ``end_id`` after an answer, is unusual."""
    if not tokenizer.chat_template:
        return []
    notes = []
    if plain_text_prefix(tokenizer) and not template_writes_bos(tokenizer):
        notes.append(
            "the tokenizer puts BOS before plain text but the chat template writes none, so "
            "conversations have none; put {{ bos_token }} at the start of chat_template: to have it"
        )
    if end_id is None:
        notes.append(
            "the chat template writes no special token after an answer, so answers are learnt "
            "without an end; give chat_template: one that does"
        )
    return notes + _rendering_notes(tokenizer, settings)


def _rendering_notes(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[str]:
    """Notes on the effects of rendering settings that their names do not show."""
    notes = []
    if settings.chat_date:
        notes.append(f"the chat template writes the date: {settings.chat_date} (chat_date)")
    if settings.auto_insert_empty_system_msg and not takes_empty_system(tokenizer):
        why = "refuses system messages" if mentions_system(tokenizer) else "mentions none"
        notes.append(f"auto_insert_empty_system_msg does nothing: the chat template {why}")
    if settings.chat_rendering == "separate":
        preamble = answer_preamble(tokenizer)
        if isinstance(preamble, str) and preamble:
            notes.append(
                f"chat_rendering: separate puts {preamble!r} at the start of each answer, which is "
                "scored on it, as in the published runs; chat_rendering: joint does not"
            )
    return notes
