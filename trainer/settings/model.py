"""Settings of the model: which one to load and how, its adapter, its sample answers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import UserError, expect_number, expect_one_of, expect_whole, is_whole
from .names import DTYPES

QUANT_TYPES = ("nf4", "fp4")


@dataclass
class AdapterSettings:
    """Whether an adapter trains in place of the model's weights, and which adapter."""

    #: Train a LoRA adapter (peft); the model itself stays frozen.
    use_peft: bool = False
    #: Rank of the adapter's matrices.
    lora_r: int = 16
    #: Scale of the adapter: what it adds is multiplied by lora_alpha / lora_r.
    lora_alpha: float = 32
    #: Dropout on the adapter's input, a probability in [0, 1). ``disable_dropout`` leaves it alone.
    lora_dropout: float = 0.05
    #: Names of the modules to adapt, or one regular expression; None for every linear layer but
    #: the head. A mixture's router and experts then stay as they are.
    lora_target_modules: list[str] | str | None = None
    #: Names of parameters to adapt that no linear layer holds, such as a mixture's experts:
    #: [mlp.experts.gate_up_proj, mlp.experts.down_proj]. They need ``lora_dropout: 0``.
    lora_target_parameters: list[str] | None = None
    #: Scale the adapter by lora_alpha / √lora_r (rsLoRA, arXiv 2312.03732).
    use_rslora: bool = False
    #: Learn each adapted weight's length apart from its direction (DoRA, arXiv 2402.09353).
    use_dora: bool = False
    #: Names of modules to train in full, with the adapter; neither the head nor a module that
    #: shares its weight.
    lora_modules_to_save: list[str] | None = None
    #: Keep the frozen model in 8 bits (bitsandbytes).
    load_in_8bit: bool = False
    #: Keep the frozen model in 4 bits (bitsandbytes): QLoRA.
    load_in_4bit: bool = False
    #: Data type of the 4 bits: "nf4" or "fp4".
    bnb_4bit_quant_type: str = "nf4"
    #: Quantize the quantization's own constants too.
    use_bnb_nested_quant: bool = False
    #: After training, write the model with the adapter merged into it to ``output_dir``/merged.
    merge_adapter: bool = False

    def check_adapter(self) -> None:
        """Raise ``UserError`` for the first value out of range, or that would do nothing."""
        if not is_whole(self.lora_r, 1):
            raise UserError(f"lora_r: expected a rank from 1 on, got {self.lora_r!r}")
        expect_number("lora_alpha", self.lora_alpha, "a number above 0", above=0)
        share = "a probability in [0, 1)"
        expect_number("lora_dropout", self.lora_dropout, share, least=0, below=1)
        expect_one_of("bnb_4bit_quant_type", self.bnb_4bit_quant_type, QUANT_TYPES)
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit are both given; keep one")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and find_spec("bitsandbytes") is None:
                raise UserError(
                    f"{name}: bitsandbytes is not installed; pip install 'widemargin[qlora]'"
                )


def check_adapted(settings: AdapterSettings, adapted: bool, quantized: bool = False) -> None:
    """Raise ``UserError`` for a setting that needs an adapter where none trains.

    ``quantized`` says that a quantization_config was given in Python.
    """
    if quantized and not adapted:
        raise UserError(
            "quantization_config: quantized weights cannot be trained themselves; give peft_config "
            "to train an adapter, or leave it out"
        )
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(settings, name) and not adapted:
            raise UserError(
                f"{name}: quantized weights cannot be trained themselves; set use_peft: true (or, "
                "in Python, give peft_config) to train an adapter, or leave it out"
            )
    if settings.merge_adapter and not adapted:
        raise UserError(
            "merge_adapter: there is no adapter to merge; set use_peft: true (or, in Python, give "
            "peft_config)"
        )


@dataclass
class ModelSettings(AdapterSettings):
    """Which model to load, and how."""

    #: Folder or hub name of the model to train.
    model_name_or_path: str | None = None
    #: Branch, tag or commit on the hub.
    model_revision: str = "main"
    #: Folder or hub name of the tokenizer; None for the model's own.
    tokenizer_name_or_path: str | None = None
    #: Tokenize as tokenizer.json says, as transformers 4 did and the published runs were made.
    #: transformers 5 rebuilds some tokenizers by their settings: Mistral's with ``legacy: false``
    #: then write the first word after ``<s>`` or ``[INST]`` with another token.
    tokenizer_as_saved: bool = False
    #: Dtype to load and update the weights in: "float32", "bfloat16", "float16", or "auto" (as
    #: saved). In bfloat16 steps of 1e-6 round away unless DeepSpeed keeps fp32 weights beside;
    #: ``bf16: true`` computes in bfloat16 with any of them.
    dtype: str = "float32"
    #: "eager", "sdpa", "flash_attention_2", ...; None for transformers' choice.
    attn_implementation: str | None = None
    #: How much of a mixture of experts' auxiliary loss, which keeps its router balanced, is added
    #: to the loss; None for what the model's config says, 0 for none.
    router_aux_loss_coef: float | None = None
    #: Run Python code that comes with the model. Off unless you trust where it comes from.
    trust_remote_code: bool = False

    def check_model(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        expect_one_of("dtype", self.dtype, ("auto", *DTYPES))
        if self.router_aux_loss_coef is not None:
            expected = "a number from 0 on, or null for the model's own"
            expect_number("router_aux_loss_coef", self.router_aux_loss_coef, expected, least=0)
        self.check_adapter()


@dataclass
class ReferenceSettings:
    """The frozen model of an objective with a reference."""

    #: Folder or hub name of the frozen model of an objective with a reference; None for the model
    #: as it is when training starts.
    ref_model_name_or_path: str | None = None
    #: Compute the reference's log-probs once before training, and keep them on disk for later
    #: runs; the frozen model is not held in memory then.
    precompute_ref_log_probs: bool = False
    #: Let the reference follow the model (TR-DPO): every ``ref_model_sync_steps`` steps its weights
    #: become ``ref_model_mixup_alpha`` times the model's, plus the rest of its own.
    sync_ref_model: bool = False
    #: Steps from one such change to the next.
    ref_model_sync_steps: int = 512
    #: The model's share in it, above 0 and at most 1.
    ref_model_mixup_alpha: float = 0.6

    def check_reference(self) -> None:
        """Raise ``UserError`` for the first of these settings that is out of range."""
        expect_whole("ref_model_sync_steps", self.ref_model_sync_steps, 1)
        share = "a number above 0 and at most 1"
        expect_number("ref_model_mixup_alpha", self.ref_model_mixup_alpha, share, above=0, most=1)


@dataclass
class SampleSettings:
    """Whether evaluations write answers, and how long and how."""

    #: Answer the first so many prompts of the evaluation set at every evaluation, into
    #: samples.jsonl in ``output_dir``; the report shows them side by side.
    eval_samples: int = 0
    #: Most tokens of such an answer.
    eval_samples_max_new_tokens: int = 128
    #: 0: the likeliest token each time. Above: drawn at this temperature, by ``seed``.
    eval_samples_temperature: float = 0.0

    def check_samples(self) -> None:
        """Raise ``UserError`` for the first value out of range, or that would do nothing."""
        for name, least in (("eval_samples", 0), ("eval_samples_max_new_tokens", 1)):
            expect_whole(name, getattr(self, name), least)
        name, value = "eval_samples_temperature", self.eval_samples_temperature
        expect_number(name, value, "a number from 0 on", least=0, below=100)
        strategy = getattr(self, "eval_strategy", "no")
        evaluates = getattr(strategy, "value", strategy) not in ("no", False, None)
        if self.eval_samples and not (evaluates or getattr(self, "eval_on_start", False)):
            raise UserError(
                "eval_samples: answers are written at evaluations, and there are none; set "
                "eval_strategy: steps and eval_steps"
            )
