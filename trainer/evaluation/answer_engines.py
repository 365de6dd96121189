"""The engines that write answers: transformers in batches, or vLLM.

Each has ``answers``: prompts and a seed for each -> an answer for each, in their order, the same
for the same batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..data.chat import pad_token
from ..errors import UserError, refusals
from ..model.generation import Completion, Decoding, complete, stop_ids
from ..model.loading import adapted_model, vocabulary_size
from .models import device_of, dtype_of, model_settings, read_model
from .settings import DecodingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VLLM_AT_ONCE = 256
"""Questions given to vLLM at once, which fills its batches itself; a killed run loses so many."""


@dataclass
class Answer:
    """An answer: its text, its length, and how it ended ("stop", "length", ...).

    ``token_ids`` are the engine's own, with the token that ended the answer; a server gives none,
    and may not give their number either.
    """

    output: str
    tokens: int | None
    finish: str
    token_ids: list[int] | None = None


def engine_name(settings: DecodingSettings, model: str) -> str:
    """The engine that ``settings`` come to on this machine, for this model."""
    installed = find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise UserError("engine: vllm is not installed; pip install vllm, or set transformers")
    adapter = adapted_model(model_settings(settings, model), model) is not None
    if settings.engine == "vllm" and adapter:
        raise UserError(
            f"engine: run widemargin merge {model} and give its folder merged/, or set "
            "transformers; vllm takes no adapters here"
        )
    if settings.engine == "auto":
        installed = installed and not adapter
        return "vllm" if installed and device_of(settings).type == "cuda" else "transformers"
    return settings.engine


def make_engine(
    name: str, model: str, settings: DecodingSettings, tokenizer: PreTrainedTokenizerBase
) -> LocalEngine:
    """The engine ``name`` with its model loaded."""
    engine = VllmEngine if name == "vllm" else TransformersEngine
    return engine(model, settings, tokenizer)


class LocalEngine(ABC):
    """An engine with the model itself, which continues token ids."""

    def __init__(
        self, model: str, settings: DecodingSettings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.load(model)

    @abstractmethod
    def load(self, model: str) -> None: ...

    @abstractmethod
    def complete(self, prompts: list[list[int]], seeds: Sequence[int]) -> list[Completion]: ...

    def answers(self, prompts: list[list[int]], seeds: Sequence[int]) -> list[Answer]:
        completions = self.complete(prompts, seeds)
        texts = self.tokenizer.batch_decode(
            [completion.token_ids for completion in completions], skip_special_tokens=True
        )
        return [
            Answer(
                text,
                len(done.token_ids),
                "length" if done.end is None else "stop",
                done.token_ids if done.end is None else [*done.token_ids, done.end],
            )
            for text, done in zip(texts, completions, strict=True)
        ]


class TransformersEngine(LocalEngine):
    """`generate`; of the model's generation config, only its end tokens count."""

    def load(self, model: str) -> None:
        settings = self.settings
        self.model = read_model(settings, model)
        self.decoding = Decoding(
            stop_ids(self.tokenizer, self.model.generation_config, settings.stop_token_ids),
            pad_token(self.tokenizer, vocabulary_size(self.model)),
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.top_k,
        )

    def complete(self, prompts: list[list[int]], seeds: Sequence[int]) -> list[Completion]:
        return complete(self.model, prompts, self.decoding, seeds)


class VllmEngine(LocalEngine):
    """vLLM."""

    def load(self, model: str) -> None:
        import vllm  # pyright: ignore[reportMissingImports]
        from transformers import GenerationConfig

        settings, saved = self.settings, None
        with suppress(OSError):  # a model without one
            saved = GenerationConfig.from_pretrained(model, revision=settings.model_revision)
        self.vllm: Any = vllm
        self.stops = stop_ids(self.tokenizer, saved, settings.stop_token_ids)
        with refusals(f"model {model}: vllm cannot load it", ValueError, RuntimeError, OSError):
            self.model = vllm.LLM(
                model=model,
                revision=settings.model_revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=dtype_of(settings),
                seed=settings.seed,
                generation_config="vllm",
            )

    def complete(self, prompts: list[list[int]], seeds: Sequence[int]) -> list[Completion]:
        settings = self.settings
        sampling = [
            self.vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self.stops,
                ignore_eos=settings.stop_token_ids is not None,
                seed=seed,
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.model.generate(inputs, sampling)
        return [self._cut(output.outputs[0]) for output in outputs]

    def _cut(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        return Completion(ids, ids.pop() if ids and output.finish_reason == "stop" else None)
