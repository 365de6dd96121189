"""The loss code of TRL's trainers on the same log-probs: losses and gradients agree."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from widemargin.trainer.objectives import build_objective

from tests.support.preference_batches import Pair, pack, random_pairs, reference_sums

trl = pytest.importorskip("trl", minversion="1.16", reason="pip install trl==1.16.0")

PAIRS, SEEDS = 9, 3


def padded(tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens [2P, L], and which of them are there [2P, L + 1], after one of a prompt."""
    parts = tokens.split(cu_seqlens.diff().tolist())
    rows = torch.nn.utils.rnn.pad_sequence([*parts], batch_first=True)
    lengths = cu_seqlens.diff()[:, None]
    mask = torch.arange(rows.shape[1]) < lengths
    return rows, torch.cat([torch.zeros(len(rows), 1), mask], 1).long()


def some_squares(tokens: Tensor) -> Tensor:
    """Logarithms of summed squared probabilities, for WPO."""
    return -0.5 - tokens.detach().sin().abs()


def dpo_loss(pairs: list[Pair], tokens: Tensor, cu_seqlens: Tensor, **given: Any) -> Tensor:
    """What TRL's DPOTrainer makes of a batch, its model's forward pass replaced."""
    rows, mask = padded(tokens, cu_seqlens)
    squares, _ = padded(some_squares(tokens), cu_seqlens)
    outputs = SimpleNamespace(
        log_probs=rows, log_sum_sq_probs=squares, entropy=rows, mean_logits=rows, is_top1=rows > 0
    )
    settings = trl.DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **given)
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    names = [
        "beta",
        "label_smoothing",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "use_weighting",
    ]
    vars(trainer).update(
        {name: getattr(settings, name) for name in names},
        args=settings,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        loss_types=settings.loss_type,
        loss_weights=settings.loss_weights or [1.0] * len(settings.loss_type),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference_sums(pairs, torch.float32).chunk(2)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer._compute_loss(lambda **_: outputs, inputs, False)


DPO: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"loss_type": ["sigmoid"]}, "dpo", {}),
    ({"loss_type": ["hinge"]}, "dpo-hinge", {}),
    ({"loss_type": ["ipo"]}, "ipo", {}),
    ({"loss_type": ["exo_pair"], "label_smoothing": 1e-3}, "exo", {}),
    ({"loss_type": ["nca_pair"]}, "nca-pair", {}),
    ({"loss_type": ["robust"], "label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ({"loss_type": ["bco_pair"]}, "bco-pair", {}),
    ({"loss_type": ["sppo_hard"]}, "sppo", {}),
    ({"loss_type": ["aot"]}, "aot", {}),
    ({"loss_type": ["aot"], "label_smoothing": 0.2}, "aot", {"label_smoothing": 0.2}),
    ({"loss_type": ["aot_unpaired"]}, "aot-unpaired", {}),
    ({"loss_type": ["apo_zero"]}, "apo-zero", {}),
    ({"loss_type": ["apo_down"]}, "apo-down", {}),
    ({"loss_type": ["discopop"]}, "discopop", {}),
    ({"loss_type": ["sft"]}, "sft", {"nll": "tokens"}),
    ({"loss_type": ["sigmoid_norm"]}, "dpo-norm", {}),
    (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"dpo": 0.8, "bco-pair": 0.2, "sft": 1.0},
        {"nll": "tokens"},
    ),
    *(
        ({"loss_type": [theirs], **given}, ours, given)
        for theirs, ours in {
            "sigmoid": "dpo",
            "ipo": "ipo",
            "nca_pair": "nca-pair",
            "aot": "aot",
        }.items()
        for given in ({"ld_alpha": 0.3}, {"ld_alpha": 0.0}, {"use_weighting": True})
        if theirs != "aot" or "ld_alpha" in given
    ),
    (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        "dpo + sft",
        {"nll": "tokens", "ld_alpha": 0.5},
    ),
    *(
        ({"loss_type": [theirs], "f_divergence_type": kind}, ours, {"f_divergence_type": kind})
        for theirs, ours in {"sigmoid": "dpo", "ipo": "ipo", "discopop": "discopop"}.items()
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
]


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize(("theirs", "name", "ours"), DPO, ids=lambda v: str(v)[:50])
def test_dpo_trainer(theirs, name, ours, beta):
    own = {"beta": beta} if name != "sft" else {}
    objective = build_objective(name, **own, **ours)
    for seed in range(SEEDS):
        pairs = random_pairs(np.random.default_rng(seed), PAIRS)
        tokens, cu_seqlens = pack(pairs, torch.float32)
        expected = dpo_loss(pairs, tokens, cu_seqlens, beta=beta, **theirs)
        reference = reference_sums(pairs, torch.float32)
        squares = some_squares(tokens)
        loss = objective(tokens, cu_seqlens, reference, log_sum_squares=squares).loss
        compare(loss, expected, tokens)


def compare(loss: Tensor, expected: Tensor, tokens: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, tokens)
    (theirs,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-6)


def made(module: str, kind: str, **attributes: Any) -> Any:
    """A trainer of TRL's with these attributes and nothing else."""
    imported = pytest.importorskip(module)
    trainer = object.__new__(getattr(imported, kind))
    vars(trainer).update(accelerator=SimpleNamespace(device=torch.device("cpu")), **attributes)
    return trainer


CPO: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss_type": "sigmoid"}, "cpo", {}),
    ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "cpo", {"label_smoothing": 0.1}),
    ({"loss_type": "hinge"}, "cpo-hinge", {}),
    ({"loss_type": "ipo"}, "cpo-ipo", {}),
    ({"loss_type": "simpo", "label_smoothing": 0.1}, "simpo", {"label_smoothing": 0.1}),
    ({"loss_type": "simpo", "cpo_alpha": 0.0}, "simpo", {}),
    ({"loss_type": "simpo", "alpha": 0.3, "cpo_alpha": 0.0}, "alphapo", {"alpha": 0.3}),
]


@pytest.mark.parametrize(("theirs", "name", "ours"), CPO, ids=lambda v: str(v)[:50])
def test_cpo_trainer(theirs, name, ours):
    beta, weight = 0.7, theirs.get("cpo_alpha", 1.3)
    given = {"beta": beta, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5} | theirs
    trainer = made("trl.experimental.cpo", "CPOTrainer", **given)
    likelihood = {"alpha" if name.startswith("cpo") else "sft_weight": weight} if weight else {}
    ours = ours | likelihood | ({"nll": "tokens"} if weight else {})
    ours |= {} if name.startswith("cpo") else {"gamma_beta_ratio": 0.5 / beta}
    objective = build_objective(name, beta=beta, **ours)
    for seed in range(SEEDS):
        tokens, cu_seqlens = pack(random_pairs(np.random.default_rng(seed), PAIRS), torch.float32)
        rows, mask = padded(tokens, cu_seqlens)
        scores = rows.sum(1)
        if given["loss_type"] in ("ipo", "simpo"):
            scores = scores / mask.sum(1)
        losses, *_ = trainer.cpo_loss(*scores.chunk(2))
        nll = -rows[:PAIRS].sum() / mask[:PAIRS].sum()  # its cross-entropy, over the batch's tokens
        compare(objective(tokens, cu_seqlens).loss, losses.mean() + weight * nll, tokens)


def some_prompts(seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Log-probs of prompts after those of ``first`` tokens, and where each begins."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (PAIRS,), generator=generator)
    ends = first + torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logps = -torch.rand(int(ends[-1]), generator=generator)
    return logps, torch.cat([torch.zeros(1, dtype=torch.int64), ends])


def test_orpo_trainer():
    trainer = made("trl.experimental.orpo", "ORPOTrainer", beta=0.3)
    objective = build_objective("orpo", alpha=0.3, nll="prompt_and_answer")
    for seed in range(SEEDS):
        tokens, cu_seqlens = pack(random_pairs(np.random.default_rng(seed), PAIRS), torch.float32)
        rows, mask = padded(tokens, cu_seqlens)
        losses, *_ = trainer.odds_ratio_loss(*(rows.sum(1) / mask.sum(1)).chunk(2))
        prompts, cu_prompts = some_prompts(seed, len(tokens))
        of_prompts = prompts[len(tokens) :]
        nll = -(rows[:PAIRS].sum() + of_prompts.sum()) / (mask[:PAIRS].sum() + len(of_prompts))
        given = {"prompt_cu_seqlens": cu_prompts, "prompts": torch.arange(PAIRS)}
        every = torch.cat([tokens, of_prompts])
        compare(objective(every, cu_seqlens, **given).loss, nll - losses.mean(), tokens)


@pytest.mark.parametrize("gain", [-0.4, 0.0, 0.7])
def test_kto_trainer(gain):
    """Both sides gain alike on average, so our two KL terms are its one."""
    objective = build_objective("kto", beta=0.3)
    trainer = trl.KTOTrainer.__new__(trl.KTOTrainer)
    vars(trainer).update(
        {"beta": 0.3, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        calculate_KL=True,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _compute_kl_logps=lambda *_: torch.zeros(2 * PAIRS),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    for seed in range(SEEDS):
        tokens, cu_seqlens = pack(random_pairs(np.random.default_rng(seed), PAIRS), torch.float32)
        rows, mask = padded(tokens, cu_seqlens)
        gains = torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(seed))
        gains = (gains - gains.mean(1, keepdim=True) + gain).flatten()
        reference = (rows.sum(1) - gains).detach()
        outputs = SimpleNamespace(log_probs=rows, entropy=rows, mean_logits=rows)
        inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
        inputs |= {"label": torch.arange(2 * PAIRS) < PAIRS, "ref_logps": reference}
        inputs |= {"ref_KL_logps": torch.full((2 * PAIRS,), -gain)}
        expected = trainer._compute_loss(lambda outputs=outputs, **_: outputs, inputs, False)
        compare(objective(tokens, cu_seqlens, reference).loss, expected, tokens)
