"""The engines that write answers: transformers in batches, or vLLM.

Either continues prompts by ``complete``; with the same prompts and seed, the same way.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..data.chat import pad_token
from ..errors import UserError, refusals
from ..model.generation import Completion, Decoding, complete, stop_ids
from ..model.loading import adapted_model, vocabulary_size
from .models import device_of, dtype_of, model_settings, read_model
from .settings import AnswerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VLLM_AT_ONCE = 256
"""Questions given to vLLM at once, which fills its batches itself; a killed run loses so many."""


def engine_name(settings: AnswerSettings, model: str) -> str:
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
    name: str, model: str, settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase
) -> TransformersEngine | VllmEngine:
    """The engine ``name`` with its model loaded."""
    engine = VllmEngine if name == "vllm" else TransformersEngine
    return engine(model, settings, tokenizer)


class TransformersEngine:
    """`generate`; of the model's generation config, only its end tokens count."""

    def __init__(
        self, model: str, settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.model = read_model(settings, model)
        self.decoding = Decoding(
            stop_ids(tokenizer, self.model.generation_config, settings.stop_token_ids),
            pad_token(tokenizer, vocabulary_size(self.model)),
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.top_k,
        )

    def complete(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        return complete(self.model, prompts, self.decoding, seed)


class VllmEngine:
    """vLLM, with a seed for each question, so that batches change no sample."""

    def __init__(
        self, model: str, settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        import vllm  # pyright: ignore[reportMissingImports]
        from transformers import GenerationConfig

        saved = None
        with suppress(OSError):  # a model without one
            saved = GenerationConfig.from_pretrained(model, revision=settings.model_revision)
        self.vllm: Any = vllm
        self.settings = settings
        self.stops = stop_ids(tokenizer, saved, settings.stop_token_ids)
        with refusals(f"model {model}: vllm cannot load it", ValueError, RuntimeError, OSError):
            self.model = vllm.LLM(
                model=model,
                revision=settings.model_revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=dtype_of(settings),
                seed=settings.seed,
                generation_config="vllm",
            )

    def complete(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        settings = self.settings
        sampling = [
            self.vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self.stops,
                ignore_eos=settings.stop_token_ids is not None,
                seed=(seed + i) % 2**31,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.model.generate(inputs, sampling)
        return [self._cut(output.outputs[0]) for output in outputs]

    def _cut(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        if ids and ids[-1] in self.stops:
            ids.pop()
        return Completion(ids, output.finish_reason == "stop")
