"""What a family does to its logits: the settings of its config that the head has to follow."""

from __future__ import annotations

from typing import Any

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Settings of a text model's config that its logits are multiplied by."""

DIVISORS = ("logits_scaling",)
"""Settings that logits are divided by."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings c of ``c * tanh(logits / c)``."""

FACTORS_DESPITE_THEIR_NAME = {
    "hyperclovax": ("logits_scaling",),
    "hyperclovax_vision_v2": ("logits_scaling",),
}
"""By model type: settings that multiply logits where other families divide by them."""

UNUSED = {
    "mpt": ("logit_scale",),
    "gemma3": ("final_logit_softcapping",),
    "aya_vision": ("logit_scale",),
}
"""By model type: settings that the config has and the model never reads."""


def logit_settings(config: Any) -> dict[str, Any]:
    """``logit_scale`` and ``softcap`` of the logits of a model with this config.

    The order is fixed: ``softcap(scale * (hidden @ weight.T + bias))``. A family that does anything
    else is found by `trial.check_head`, and refused.
    """
    text, kind = config.get_text_config(), config.model_type
    unused = UNUSED.get(kind, ())
    inverted = FACTORS_DESPITE_THEIR_NAME.get(kind, ())

    def given(names: tuple[str, ...]) -> list[tuple[str, float]]:
        found = ((name, getattr(text, name, None)) for name in names if name not in unused)
        return [(name, float(value)) for name, value in found if value]

    scale = 1.0
    for _, factor in given(FACTORS):
        scale *= factor
    for name, divisor in given(DIVISORS):
        scale = scale * divisor if name in inverted else scale / divisor
    caps = [cap for _, cap in given(SOFTCAPS)]
    return {"logit_scale": scale, "softcap": caps[0] if caps else None}
