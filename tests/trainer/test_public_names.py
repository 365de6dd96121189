"""Names that other people's scripts import, which no move may break."""

from __future__ import annotations

from importlib import import_module

import pytest

NAMES = {
    "widemargin.kernels.linear_logprob": ["linear_logprob"],
    "widemargin.kernels.margin_loss": ["margin_loss", "sequence_logps"],
    "widemargin.kernels.reference": ["linear_logprob"],
    "widemargin.trainer": ["PreferenceConfig", "PreferenceTrainer"],
    "widemargin.trainer.cli": ["main"],
    "widemargin.trainer.data": ["DataSettings", "load_pairs", "tokenize_pairs"],
    "widemargin.trainer.data.pairs": ["load_pairs"],
    "widemargin.trainer.errors": ["UserError"],
    "widemargin.trainer.evaluation.judging": [],
    "widemargin.trainer.evaluation.pairs": [],
    "widemargin.trainer.evaluation.settings": [],
    "widemargin.trainer.head": ["check_head", "patch_head"],
    "widemargin.trainer.objectives": ["OBJECTIVES", "build_objective"],
    "widemargin.trainer.run_lmpo": ["main"],
    "widemargin.trainer.run_simpo": ["main"],
    "widemargin.trainer.run_xpo": ["main"],
}


@pytest.mark.parametrize("module", NAMES)
def test_it_is_where_it_was(module):
    imported = import_module(module)
    assert [name for name in NAMES[module] if not hasattr(imported, name)] == []
