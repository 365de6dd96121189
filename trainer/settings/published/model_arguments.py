"""TRL's ``model_init_kwargs``, which go to ``from_pretrained``, as settings of their own."""

from __future__ import annotations

from typing import Any

from ...errors import UserError, expect

SETTINGS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}
WITHOUT_EFFECT = ("use_cache", "low_cpu_mem_usage", "use_safetensors")


def model_arguments(value: Any, _: dict[str, Any]) -> dict[str, Any]:
    """The settings that arguments of ``from_pretrained`` stand for."""
    expect("model_init_kwargs", value, isinstance(value, dict | None), "a mapping")
    new = {}
    for name, argument in (value or {}).items():
        if name not in SETTINGS and name not in WITHOUT_EFFECT and argument is not None:
            raise UserError(
                f"model_init_kwargs: leave {name} out, or load the model yourself; of them dtype, "
                "attn_implementation, revision and trust_remote_code are settings here"
            )
        if name in SETTINGS and argument is not None:  # a dtype may be torch's own
            known = isinstance(argument, str | bool)
            new[SETTINGS[name]] = argument if known else str(argument).removeprefix("torch.")
    return new
