"""A byte-level BPE tokenizer trained in memory, and chat templates with the habits of real ones."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CORPUS = [
    "The capital of France is Paris. What is the capital of France?",
    "User: Is water wet? Assistant: yes, it is wet. no, it is not.",
    "yes yes yes no no no maybe maybe I am not sure about that, sorry.",
    "You are a helpful assistant. Answer in one word, please. system user assistant",
]

_TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

#: BOS first; a newline after the end-of-turn token.
WITH_BOS = "{{ bos_token }}" + _TURNS + _ASK
#: No BOS; turns end with EOS (as in Zephyr's).
WITHOUT_BOS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}" + _ASK
)
#: Writes a system prompt of its own where there is none (as in Qwen2.5's).
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>\nYou are a helpful assistant.<|end|>\n"
    "{% endif %}" + _TURNS + _ASK
)
#: Refuses system messages (as in Gemma's).
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}" + _TURNS + _ASK
)
#: The space before an answer merges with its first word: the prompt's last token is not kept.
MERGING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n"
    "{% else %}Assistant: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
#: Never says that a turn is over.
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

TEMPLATES = {
    "with_bos": WITH_BOS,
    "without_bos": WITHOUT_BOS,
    "default_system": DEFAULT_SYSTEM,
    "no_system": NO_SYSTEM,
    "merging": MERGING,
    "without_end": WITHOUT_END,
}


@cache
def _backend_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer.to_str()


def tiny_tokenizer(
    template: str | None = WITH_BOS, adds_bos: bool = True
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; ``adds_bos`` is what it does to plain text."""
    backend = Tokenizer.from_str(_backend_json())
    if not adds_bos:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer
