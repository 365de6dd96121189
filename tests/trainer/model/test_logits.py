"""Scales and softcaps of logits, under every name that transformers' families give them."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.model.logits import DIVISORS, FACTORS, SOFTCAPS, logit_settings
from widemargin.trainer.model.trial import check_head

from tests.support.tiny_models import tiny_model

REFUSED = {"unpadded_vocab_size", "max_inference_chunksize"}
"""Settings that change logits in a way that is refused, or only in inference."""

NOT_SETTINGS = {
    *("config", "model", "weight", "training", "text_config", "dtype", "shape", "functional"),
    *("lm_head", "decoder", "head", "long"),
}
"""What else stands behind a dot there."""

TREATED = [
    pytest.param("gemma2", {"final_logit_softcapping": 0.5}, id="gemma2"),
    pytest.param("gemma3_text", {"final_logit_softcapping": 0.5}, id="gemma3 text"),
    pytest.param("vaultgemma", {"final_logit_softcapping": 0.5}, id="vaultgemma"),
    pytest.param("nanochat", {"final_logit_softcapping": 0.5}, id="nanochat"),
    pytest.param("recurrent_gemma", {"logits_soft_cap": 0.5}, id="recurrent_gemma"),
    pytest.param("cohere", {"logit_scale": 3.0}, id="cohere"),
    pytest.param("cohere2", {"logit_scale": 3.0}, id="cohere2"),
    pytest.param("granite", {"logits_scaling": 3.0}, id="granite divides"),
    pytest.param("hyperclovax", {"logits_scaling": 3.0}, id="hyperclovax multiplies"),
    pytest.param("falcon_h1", {"lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                               "mamba_d_head": 8, "mamba_d_state": 8}, id="falcon_h1"),
    pytest.param("mpt", {"logit_scale": 3.0, "d_model": 32, "n_heads": 4, "n_layers": 2},
                 id="mpt reads none"),
    pytest.param("llama", {}, id="llama"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), TREATED)
def test_each_treatment_gives_the_models_own_log_probs(family, changes):
    model = tiny_model(family, **changes)
    plain = copy.deepcopy(model).eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        logps = plain(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    expected = logps.gather(1, tokens[0, 1:, None])[:, 0]
    patch_head(model.eval(), tail="exact")
    scored = model(input_ids=tokens, select=torch.arange(19), targets=tokens[0, 1:])
    torch.testing.assert_close(scored.token_logps, expected, rtol=1e-4, atol=1e-4)
    check_head(model)


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": 30.0}, {"logits_scaling": 1.01}])
def test_a_setting_that_small_logits_do_not_feel_is_missed_by_no_check(changes, monkeypatch):
    """A softcap of 30 changes logits near 0 by nothing that shows in log-probs."""
    model = tiny_model("gemma2" if "final" in next(iter(changes)) else "granite", **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    scoring = patch_head(model)
    check_head(model)
    scoring.softcap, scoring.logit_scale = None, 1.0
    with pytest.raises(UserError, match="own logits"):
        check_head(model)


def test_every_setting_that_changes_logits_is_in_the_table():
    """In the sources of all causal families of the installed transformers."""
    known = {*FACTORS, *DIVISORS, *SOFTCAPS, *REFUSED}
    unknown, seen = {}, set()
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        used = _settings_between_head_and_loss(name)
        seen |= used
        if used - known:
            unknown[name] = used - known
    assert not unknown
    assert {"final_logit_softcapping", "logits_scaling", "lm_head_multiplier"} <= seen


def test_a_model_without_any_has_a_scale_of_one():
    config = tiny_model().config
    assert logit_settings(config) == {"logit_scale": 1.0, "softcap": None}


@cache
def _classes() -> dict[str, str]:
    """The source of every class of transformers' modeling files."""
    folder = Path(transformers.__file__).parent / "models"
    found = {}
    for path in folder.glob("*/modeling_*.py"):
        for match in re.finditer(
            r"^class (\w+)\(.*?(?=^class |\Z)", path.read_text(encoding="utf-8"), re.S | re.M
        ):
            found.setdefault(match.group(1), match.group(0))
    return found


def _settings_between_head_and_loss(name: str) -> set[str]:
    """Attributes read where logits are made and until a loss is computed of them."""
    forward = re.search(r"\n    def forward\(.*?(?=\n    def |\n    @|\Z)", _classes()[name], re.S)
    lines = [] if forward is None else forward.group(0).splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s+(lm_)?logits = self\.", line)]
    if not starts:
        return set()
    block = []
    for line in lines[starts[0] :]:
        if "labels" in line or "return " in line or "loss" in line:
            break
        block.append(line)
    text = "\n".join(block)
    return set(re.findall(r"(?<=\.)([a-z]\w+)\b(?!\()", text)) - NOT_SETTINGS
