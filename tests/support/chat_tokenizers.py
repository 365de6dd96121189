"""Small tokenizers with the conventions of four families: their pieces, special tokens, templates.

Trained in memory on a few lines. What they share with the real ones is what rendering depends on:
which special tokens there are, who writes BOS, what is refused, how blanks are handled.
"""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Is water wet? Yes, it is. No, it is not. maybe maybe yes no",
    "You are a helpful assistant. Answer briefly. system user model assistant",
]

#: A default system prompt, no BOS, a newline after the end of a turn.
QWEN = (
    "{%- if messages[0].role == 'system' -%}{%- set start = messages[0].content -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}"
    "{%- set start = 'You are a helpful assistant.' -%}{%- set turns = messages -%}{%- endif -%}"
    "{{- '<|im_start|>system\n' + start + '<|im_end|>\n' -}}{%- for turn in turns -%}"
    "{{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
#: BOS, no word of system, the end of a turn right before the next.
LLAMA3 = (
    "{% for turn in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' }}"
    "{{ turn.content | trim }}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate, the user first') }}{% endif %}"
)
#: BOS, no system messages, the user first; answers are the model's.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for turn in messages %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
    "{{ turn.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
#: The same for turns of any order, with a system message joined to what follows it (SimPO's).
GEMMA2_OPEN = (
    "{{ bos_token }}{% set start = '' %}{% if messages[0].role == 'system' %}"
    "{% set start = messages[0].content | trim + '\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for turn in messages %}"
    "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
    "{{ ((start if loop.first else '') + turn.content) | trim }}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
#: BOS, no system messages, the user first; marks of turns are plain text, answers end with EOS.
MISTRAL = (
    "{{ bos_token }}{% for turn in messages %}"
    + _ALTERNATE
    + "{% if turn.role == 'user' %}{{ '[INST] ' + turn.content + ' [/INST]' }}"
    "{% elif turn.role == 'assistant' %}{{ turn.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2.5": {
        "pieces": "bytes",
        "template": QWEN,
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "llama3": {
        "pieces": "bytes",
        "template": LLAMA3,
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    },
    "gemma2": {
        "pieces": "blanks",
        "template": GEMMA2,
        "special": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    },
    "mistral": {
        "pieces": "prefixed",
        "template": MISTRAL,
        "special": ["<unk>", "<s>", "</s>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
    "mistral, newer file": {
        "pieces": "metaspace",
        "template": MISTRAL,
        "special": ["<unk>", "<s>", "</s>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
}


@cache
def _backend_json(family: str) -> str:
    facts = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    alphabet = [*string.printable.strip(), "▁", "\n"]
    if facts["pieces"] == "bytes":
        words = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif facts["pieces"] == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace()
    else:
        blanks = normalizers.Replace(" ", "▁")
        prefixed = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        tokenizer.normalizer = prefixed if facts["pieces"] == "prefixed" else blanks
        tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=facts["special"],
        initial_alphabet=alphabet,
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos := facts.get("bos_token"):
        number = facts["special"].index(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, number)]
        )
    return tokenizer.to_str()


def family_tokenizer(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of ``family`` with its own template, or another."""
    names = {k: v for k, v in FAMILIES[family].items() if k.endswith("_token")}
    backend = Tokenizer.from_str(_backend_json(family))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template or FAMILIES[family]["template"]
    return tokenizer
