"""TRL's tests of CPOTrainer and ORPOTrainer, one situation for each case of each test."""

from __future__ import annotations

from typing import Any

from tests.trl_situations.dpo import METRIC, STEPS, has_metric, named_in_card
from tests.trl_situations.situation import Situation

LIBRARIES = "means another loss in each library"
FORMATS = ("standard", "implicit", "conversational", "conversational implicit")
ENCODER = {"is_encoder_decoder": True}
NO_ENCODER = "models are decoder-only"


def _cpo(loss: str, data: str, instead: dict[str, Any] | None, said: str) -> Situation:
    settings = {"loss_type": loss, "cpo_alpha": 1.0, "beta": 0.1, **STEPS}
    if instead is not None:
        instead = {**settings, **instead}
        del instead["loss_type"]
    return Situation(
        *("cpo", "cpo_trainer", f"{loss}, {data}", settings),
        data=data,
        evaluation=data,
        said=said,
        instead=instead,
        quick=loss == "simpo",
    )


def orpo(test: str, case: str = "", settings: Any = None, **others: Any) -> Situation:
    settings = {"objective": "orpo"} | (settings or {})
    return Situation("orpo", test, case, settings, **others)


T5 = {"model": "t5", "data": "implicit", "said": NO_ENCODER}
CPO = [
    _cpo("sigmoid", "standard", {"objective": "cpo"}, LIBRARIES),
    _cpo("ipo", "conversational", {"objective": "cpo-ipo"}, LIBRARIES),
    _cpo("hinge", "conversational", {"objective": "cpo-hinge"}, LIBRARIES),
    _cpo("simpo", "standard", {"objective": "simpo", "simpo_gamma": 0.5}, "simpo_gamma: (in TRL"),
    *(
        Situation(
            *("cpo", "cpo_trainer", f"{loss}, an encoder-decoder"),
            {"objective": objective, **ENCODER},
            **T5,
        )
        for loss, objective in (("hinge", "cpo-hinge"), ("simpo", "simpo"))
    ),
    *(
        Situation(
            *("cpo", "cpo_trainer_with_lora", kind),
            {"objective": "cpo", "beta": 0.1, "cpo_alpha": 1.0, "gradient_accumulation_steps": 2},
            data=kind,
            adapter="lora with dropout",
            quick=kind == "implicit",
        )
        for kind in FORMATS
    ),
    Situation(
        *("cpo", "compute_metrics", "", {"objective": "cpo", "do_eval": True, **STEPS}),
        evaluation="standard",
        arguments=METRIC,
        check=has_metric,
    ),
    Situation(
        *("cpo", "alphapo_trainer", ""),
        {"loss_type": "alphapo", "alpha": 0.5, "simpo_gamma": 0.5, "beta": 0.1, **STEPS},
        evaluation="standard",
    ),
]

ORPO = [
    orpo("trust_remote_code", "not given", model="remote code", said="trust_remote_code: true"),
    orpo("trust_remote_code", "given", {"trust_remote_code": True}, model="remote code"),
    *(
        orpo(
            *("orpo_trainer", kind, {"beta": 0.1, **STEPS}),
            data=kind,
            evaluation=kind,
            said="write alpha for TRL's beta",
            instead={"objective": "orpo", "alpha": 0.1, **STEPS},
            quick=kind == "standard",
        )
        for kind in ("standard", "conversational")
    ),
    orpo("orpo_trainer", "an encoder-decoder", ENCODER, **T5),
    orpo("orpo_trainer_processing_class_autoloaded", model="by name", tokenizer="left out"),
    *(
        orpo(
            *("orpo_trainer_with_lora", kind, {"gradient_accumulation_steps": 2}),
            data=kind,
            adapter="lora with dropout",
        )
        for kind in FORMATS
    ),
    orpo("compute_metrics", "", {"do_eval": True, **STEPS}, evaluation="standard",
         arguments=METRIC, check=has_metric),
    orpo("train_model_dtype", settings={"model_init_kwargs": {"dtype": "float16"}},
         model="by name", tokenizer="left out"),
    orpo("train_with_eval", settings=STEPS, evaluation="standard"),
    orpo("train_with_gradient_checkpointing", settings={"gradient_checkpointing": True}),
    orpo("tag_added", check=named_in_card),
    orpo("tag_added_peft", adapter="lora", check=named_in_card),
]  # fmt: skip

TABLE = CPO + ORPO
