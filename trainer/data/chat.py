"""Chat templates: which one, how it renders, and where its turns end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .rows import Messages, RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_REFUSED = "refused by the chat template"
_PROBE = "PROBE"


def read_chat_template(value: str) -> str:
    """The template that the setting ``chat_template`` means: itself, or the file it names."""
    if "{{" in value or "{%" in value:
        return value
    if os.path.isfile(value):
        with open(value, encoding="utf-8") as file:
            return file.read()
    raise UserError(
        f"chat_template: {value!r} is neither a Jinja template (no {{{{ or {{% in it) "
        "nor an existing file; give the template itself or its path"
    )


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
    rendered = render(tokenizer, [[{"role": "user", "content": _PROBE}]], generation=True)[0]
    return isinstance(rendered, str) and rendered.startswith(str(tokenizer.bos_token))


def only_id(token_id: Any) -> int | None:
    """A special token's id, as ``tokenizer.bos_token_id`` and the like give it."""
    return token_id if isinstance(token_id, int) else None
