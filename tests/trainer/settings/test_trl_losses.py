"""TRL's lists of losses and its arguments for some losses alone."""

from __future__ import annotations

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.files import build_config


def built(**given):
    notes: list[str] = []
    config = build_config({"output_dir": "x", "use_cpu": True, **given}, notes=notes)
    return config.build_objective(), notes


def test_a_list_of_losses_is_a_mixture():
    objective, notes = built(
        loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.3
    )
    assert objective.name == "0.8*dpo + 0.2*bco-pair + sft"
    assert objective.hyperparameters.nll == "tokens"
    assert objective.hyperparameters.beta == 0.3  # pyright: ignore[reportAttributeAccessIssue]
    assert any("0.8*dpo + 0.2*bco-pair + sft, nll: tokens" in note for note in notes)
    assert built(loss_type=["hinge", "ipo"])[0].name == "dpo-hinge + ipo"
    assert built(loss_type=["nca_pair"], loss_weights=[0.5])[0].name == "0.5*nca-pair"


def test_a_mapping_of_objectives_is_a_mixture():
    objective, _ = built(objective={"dpo": 0.8, "bco": 0.2, "sft": 1}, label_smoothing=0.1)
    assert objective.name == "0.8*dpo + 0.2*bco + sft"
    assert objective.hyperparameters.label_smoothing == 0.1  # pyright: ignore


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, "loss_weights: expected 2 numb"),
        ({"loss_type": "aot", "loss_weights": [1]}, "loss_weights: give loss_type a list"),
        ({"loss_type": ["sigmoid", "dpo"]}, "name each loss once"),
        ({"loss_type": ["sigmoid", "sft"], "objective": "dpo"}, "keep objective"),
        ({"loss_type": ["sigmoid", "kl"]}, "objective 'kl' is not known"),
        ({"objective": "kto", "f_divergence_type": "forward_kl"}, "kto knows reverse_kl alone"),
        ({"objective": "simpo", "ld_alpha": 0.5}, "simpo knows 1 alone, got 0.5"),
    ],
)
def test_what_is_no_mixture_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        built(**given)


def test_arguments_of_other_losses_change_nothing():
    given = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.1}
    plain, with_them = built(objective="kto")[0], built(objective="kto", **given)[0]
    assert with_them.hyperparameters == plain.hyperparameters
    assert built(objective="simpo", ld_alpha=None)[0].name == "simpo"
    weighted = built(objective="dpo", ld_alpha=0.5, use_weighting=True)[0].hyperparameters
    assert (weighted.ld_alpha, weighted.use_weighting) == (0.5, True)  # pyright: ignore
    tau = built(objective="discopop", **given)[0].hyperparameters
    assert tau.discopop_tau == 0.1  # pyright: ignore[reportAttributeAccessIssue]
