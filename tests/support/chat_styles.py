"""Chat templates in the styles of well-known families, and tokenizers that have their tokens.

The templates are written for these tests, in `chat_templates/`: what a family writes around a
message, what it trims, refuses, folds in, drops, dates or adds for the last turn alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tests.support.chat_tokenizers import family_tokenizer

_FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Style:
    """How a family's tokenizer and template behave.

    Args:
        pieces: the family of `chat_tokenizers` whose pieces it has.
        special: its special tokens, blanks between them.
        eos: its EOS; "" for that of ``pieces``.
        end: what ends an answer; "" where the template writes no token.
        opens: what the template writes before an answer's text, after the generation prompt.
        given: what its template is given.
        file: its template, where two styles share one.
    """

    pieces: str
    special: str = ""
    eos: str = ""
    end: str = ""
    opens: str = ""
    given: tuple[tuple[str, Any], ...] = ()
    file: str = ""


_CHATML = "<|im_start|> <|im_end|>"
_MISTRAL = "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]"
_HARMONY = "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>"
_COHERE = (
    "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|>"
)
_DEEPSEEK = "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>"
_ROLES = "<|user|> <|assistant|> <|system|> <|end|> <|tool|> <|/tool|>"
_END, _TURN = "<|im_end|>", "<|END_OF_TURN_TOKEN|>"
_QWEN3 = f"{_CHATML} <think> </think> <tool_call> </tool_call>"
_UNTHOUGHT = "<think></think>"

STYLES: dict[str, Style] = {
    "llama3": Style("llama3", "<|eom_id|>", end="<|eot_id|>"),
    "llama2": Style("mistral", end="</s>"),
    "qwen25": Style("qwen2.5", end=_END),
    "qwen3": Style("qwen2.5", _QWEN3, end=_END, opens=_UNTHOUGHT),
    "qwen3, thinking off": Style(
        "qwen2.5", _QWEN3, end=_END, given=(("enable_thinking", False),), file="qwen3"
    ),
    "gemma2": Style("gemma2", end="<end_of_turn>"),
    "gemma3": Style("gemma2", "<start_of_image>", end="<end_of_turn>"),
    "mistral_v1": Style("mistral", end="</s>"),
    "mistral_v3": Style("mistral, newer file", _MISTRAL, end="</s>"),
    "tekken": Style("mistral, newer file", f"{_MISTRAL} [SYSTEM_PROMPT] [ARGS]", end="</s>"),
    "phi3": Style("mistral", _ROLES, eos="<|endoftext|>", end="<|end|>"),
    "phi4": Style("qwen2.5", "<|im_sep|>", end=_END),
    "phi4_mini": Style("qwen2.5", _ROLES, eos="<|endoftext|>", end="<|end|>"),
    "gpt_oss": Style(
        "qwen2.5",
        _HARMONY,
        eos="<|return|>",
        end="<|return|>",
        opens="<|channel|>final<|message|>",
    ),
    "deepseek": Style(
        "llama3", _DEEPSEEK, eos="<｜end▁of▁sentence｜>", end="<｜end▁of▁sentence｜>"
    ),
    "glm4": Style("qwen2.5", f"{_ROLES} [gMASK] <sop> <|observation|>", eos="<|endoftext|>"),
    "command_r": Style("llama3", _COHERE, eos=_TURN, end=_TURN),
    "command_a": Style(
        "llama3", _COHERE, eos=_TURN, opens="<|START_RESPONSE|>", end=f"<|END_RESPONSE|>{_TURN}"
    ),
    "granite": Style(
        "qwen2.5",
        "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>",
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
    ),
    "zephyr": Style("mistral", end="</s>"),
    "chatml": Style("llama3", _CHATML, end=_END),
    "vicuna": Style("mistral", end="</s>"),
    "falcon": Style("qwen2.5", eos="<|endoftext|>"),
    "falcon3": Style("qwen2.5", _ROLES, eos="<|endoftext|>", end="<|endoftext|>"),
    "nemotron": Style("mistral, newer file", "<extra_id_0> <extra_id_1>"),
    "smollm2": Style("qwen2.5", end=_END),
    "smollm3": Style("qwen2.5", _QWEN3, end=_END),
    "olmo2": Style("qwen2.5", _ROLES, eos="<|endoftext|>", end="<|endoftext|>"),
}


@cache
def styled_tokenizer(name: str) -> Any:
    """The tokenizer of a style; do not change it."""
    style = STYLES[name]
    template = (_FOLDER / f"{style.file or name}.jinja").read_text(encoding="utf-8")
    tokenizer: Any = family_tokenizer(style.pieces, template)
    tokens = [AddedToken(token, special=True, normalized=False) for token in style.special.split()]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if style.eos:
        tokenizer.add_special_tokens({"eos_token": style.eos})
    if "bos_token" in template and tokenizer.bos_token is None:  # OLMo's, which is its EOS too
        tokenizer.bos_token = style.eos
    return tokenizer
