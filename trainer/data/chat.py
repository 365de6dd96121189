"""Chat templates: which one, how it renders, and where its turns end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .rows import Messages, RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..settings.data import DataSettings

TEMPLATE_REFUSED = "refused by the chat template"
Rendered = tuple[str, str, str]
"""A pair as text: its prompt, the prompt with chosen, the prompt with rejected."""

_PROBE = "PROBE"
_SHIPPED = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Rendering:
    """The settings that decide which text a conversation becomes; see `DataSettings`."""

    separate: bool = False
    empty_system: bool = False

    @classmethod
    def of(cls, settings: DataSettings) -> Rendering:
        return cls(settings.chat_rendering == "separate", settings.auto_insert_empty_system_msg)


def read_chat_template(value: str) -> str:
    """The template that the setting ``chat_template`` means: itself, a shipped one, or a file."""
    if "{{" in value or "{%" in value:
        return value
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jinja"))}
    path = shipped.get(value, Path(os.path.expanduser(value)))
    if not path.is_file():
        raise UserError(
            f"chat_template: {value!r} is neither a Jinja template (no {{{{ or {{% in it) nor an "
            f"existing file nor a shipped template; give the template itself, its path, or one of "
            f"{', '.join(shipped)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template: {value}: cannot be read as UTF-8 text ({error}); name another file"
        ) from error


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], generation: bool
) -> list[str | RowProblem]:
    """Each conversation as text; one the template raises on becomes a ``RowProblem``."""
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds messages but the tokenizer has no chat template; set chat_template: to "
            "a Jinja template or its path, or start from a model that has one"
        )
    try:
        return list(_apply(tokenizer, conversations, generation))
    except Exception:
        return [_render_one(tokenizer, conversation, generation) for conversation in conversations]


def _render_one(
    tokenizer: PreTrainedTokenizerBase, conversation: Messages, generation: bool
) -> str | RowProblem:
    try:
        return _apply(tokenizer, [conversation], generation)[0]
    except Exception as error:  # a template can raise anything on a row it was not written for
        return RowProblem(TEMPLATE_REFUSED, f"{type(error).__name__}: {error}")


def _apply(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], generation: bool
) -> Any:
    return tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=generation
    )


def example_prompt(tokenizer: PreTrainedTokenizerBase, generation: bool) -> str | None:
    """A short rendered prompt, to see what this template's prompts end with."""
    prompt = [{"role": "user", "content": _PROBE}]
    text = render(tokenizer, [prompt], generation)[0]
    return text if isinstance(text, str) else None


def takes_empty_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template mentions system messages and does not refuse them."""
    if not mentions_system(tokenizer):
        return False
    probe = [{"role": "system", "content": ""}, {"role": "user", "content": _PROBE}]
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
    answer = {"role": "assistant", "content": _PROBE}
    ask = {"role": "user", "content": "?"}
    alone, joint = render(tokenizer, [[answer], [ask, answer]], generation=False)
    if isinstance(alone, RowProblem):
        return alone
    alone = without_bos(tokenizer, alone)
    if isinstance(joint, RowProblem) or _PROBE not in joint:
        return ""
    ends = (len(alone) - i for i in range(len(alone) + 1) if joint.endswith(alone[i:]))
    return alone[: len(alone) - next(ends)]


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` without the BOS it may begin with."""
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token the chat template closes an answer with, where generation stops; None without one.

    It is looked for in what the template writes after an answer: EOS if that is there (``</s>``),
    else the first special token (``<end_of_turn>``, ``<|im_end|>`` of a tokenizer whose EOS is
    another), else the first added token that is not blank.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    rendered = render(tokenizer, [probe], generation=False)[0]
    if isinstance(rendered, RowProblem) or _PROBE not in rendered:
        return only_id(tokenizer.eos_token_id)
    after = tokenizer(rendered.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    eos = [i for i in after if i == only_id(tokenizer.eos_token_id)]
    special = [i for i in after if i in added and added[i].special]
    named = [i for i in after if i in added and added[i].content.strip()]
    return next(iter(eos + special + named), None)


def plain_text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens the tokenizer itself puts before plain text (BOS, for those that do)."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    dressed = tokenizer(_PROBE)["input_ids"]
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
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[Messages, Messages, Messages]]
) -> list[Rendered | RowProblem]:
    """Each pair as one conversation a side, the prompt with the generation prompt."""
    prompts = render(tokenizer, [prompt for prompt, _, _ in pairs], generation=True)
    chosen, rejected = (
        render(tokenizer, [pair[0] + pair[part] for pair in pairs], generation=False)
        for part in (1, 2)
    )
    rendered: list[Rendered | RowProblem] = []
    for texts in zip(prompts, chosen, rejected, strict=True):
        refused = next((text for text in texts if isinstance(text, RowProblem)), None)
        rendered.append(refused or (str(texts[0]), str(texts[1]), str(texts[2])))
    return rendered


def template_notes(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[str]:
    """Notes for the report where the tokenizer's template is unusual."""
    if not tokenizer.chat_template:
        return []
    notes = []
    if plain_text_prefix(tokenizer) and not template_writes_bos(tokenizer):
        notes.append(
            "the tokenizer puts BOS before plain text but the chat template writes none, so "
            "conversations have none; put {{ bos_token }} at the start of chat_template: to have it"
        )
    if end_of_turn_id(tokenizer) is None:
        notes.append(
            "the chat template writes no special token after an answer, so answers are learnt "
            "without an end; give chat_template: one that does"
        )
    return notes + _rendering_notes(tokenizer, settings)


def _rendering_notes(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[str]:
    """Notes on the effects of rendering settings that their names do not show."""
    notes = []
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
