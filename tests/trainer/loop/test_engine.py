"""DeepSpeed's own file beside the settings: agreed, said or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.arguments import check_deepspeed, check_saves_whole

from tests.support.tiny_models import tiny_config

AUTO: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}
ADAMW = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}


def check(folder: Any, changes: dict[str, Any], **settings: Any) -> list[str]:
    """The check of a file, filled in by transformers as a trainer would."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import (
        HfTrainerDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    args = tiny_config(folder, **{"optim": "adamw_torch", **settings})
    file = {k: v for k, v in (AUTO | changes).items() if v is not None}
    filled = HfTrainerDeepSpeedConfig(file)
    filled.trainer_config_process(args)
    unset_hf_deepspeed_config()
    plugin = SimpleNamespace(hf_ds_config=filled)
    return check_deepspeed(SimpleNamespace(deepspeed_plugin=plugin), args)


def test_files_that_agree(tmp_path):
    assert check(tmp_path, {}) == []
    assert check(tmp_path, {"gradient_clipping": None}, max_grad_norm=0.0) == []
    (said,) = check(tmp_path, {"optimizer": ADAMW})
    assert "own AdamW trains" in said
    assert check_deepspeed(SimpleNamespace(), None) == []


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        pytest.param(
            {"gradient_accumulation_steps": 7}, {},
            'gradient_accumulation_steps: "auto", where it says 7', id="accumulation",
        ),
        pytest.param({"bf16": {"enabled": True}}, {}, 'bf16.enabled: "auto"', id="precision"),
        pytest.param({"gradient_clipping": 3.5}, {}, "max_grad_norm is", id="clipping"),
        pytest.param(
            {"gradient_clipping": None}, {"max_grad_norm": 1.0}, "max_grad_norm has no effect",
            id="no clipping",
        ),
        pytest.param({"scheduler": {"type": "WarmupLR"}}, {}, "no scheduler", id="scheduler"),
        pytest.param({"curriculum_learning": {"enabled": True}}, {}, "no curriculum", id="other"),
        pytest.param({"optimizer": ADAMW}, {"optim": "sgd"}, "optim is sgd", id="optimizer"),
        pytest.param({"optimizer": ADAMW}, {"weight_decay": 0.1}, "weight_decay", id="decay"),
        pytest.param(
            {"optimizer": {"type": "AdamW"}}, {}, 'optimizer.params.lr: "auto"', id="no rate"
        ),
        pytest.param({"optimizer": {"type": "Lion"}}, {}, "has Lion", id="another optimizer"),
    ],
)  # fmt: skip
def test_files_that_contradict_the_settings(changes, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check(tmp_path, changes, **settings)


@pytest.mark.parametrize(
    ("engine", "setting"),
    [
        ({"fsdp_plugin": SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")}, "fsdp_state"),
        ({"deepspeed_plugin": SimpleNamespace(
            deepspeed_config={"zero_optimization": {"stage": 3}})}, "stage3_gather"),
    ],
)  # fmt: skip
def test_an_engine_that_saves_no_model_is_refused(engine, setting):
    with pytest.raises(UserError, match=f"^{setting}"):
        check_saves_whole(SimpleNamespace(**engine))


def test_engines_that_save_a_model():
    full = SimpleNamespace(state_dict_type="StateDictType.FULL_STATE_DICT")
    gathered = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    for zero in (gathered, {"stage": 2}):
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        check_saves_whole(SimpleNamespace(deepspeed_plugin=plugin))
    check_saves_whole(SimpleNamespace(fsdp_plugin=full))
    check_saves_whole(SimpleNamespace())
