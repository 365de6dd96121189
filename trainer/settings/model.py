"""Settings of the model: which one to load, and how."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter import AdapterSettings
from .names import DTYPES
from .values import expect_one_of


@dataclass
class ModelSettings(AdapterSettings):
    """Which model to load, and how."""

    #: Folder or hub name of the model to train.
    model_name_or_path: str | None = None
    #: Branch, tag or commit on the hub.
    model_revision: str = "main"
    #: Folder or hub name of the tokenizer; None for the model's own.
    tokenizer_name_or_path: str | None = None
    #: Dtype to load and update the weights in: "float32", "bfloat16", "float16", or "auto" (as
    #: saved). In bfloat16 steps of 1e-6 round away unless DeepSpeed keeps fp32 weights beside;
    #: ``bf16: true`` computes in bfloat16 with any of them.
    dtype: str = "float32"
    #: "eager", "sdpa", "flash_attention_2", ...; None for transformers' choice.
    attn_implementation: str | None = None
    #: Run Python code that comes with the model. Off unless you trust where it comes from.
    trust_remote_code: bool = False

    def check_model(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        expect_one_of("dtype", self.dtype, ("auto", *DTYPES))
        self.check_adapter()
