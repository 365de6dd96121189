"""The accelerate configs, as the installed accelerate reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
KINDS = {
    "cpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "deepspeed_zero3_offload": DistributedType.DEEPSPEED,
}


def test_each_file_is_known_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision is None  # the run's own bf16 says


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("deepspeed")])
def test_deepspeed_settings(name, monkeypatch):
    """As `accelerate launch` passes them on, up to the run's own values in place of "auto"."""
    stage = 2 if "zero2" in name else 3
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    given = settings["deepspeed_config"]
    file = FOLDER.parent.parent / given["deepspeed_config_file"]
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", ",".join(given))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", str(given["zero3_init_flag"]).lower())
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    read = plugin.deepspeed_config
    assert plugin.zero_stage == read["zero_optimization"]["stage"] == stage
    assert plugin.zero3_init_flag == (stage == 3)
    assert read["bf16"]["enabled"] is True
    assert read["data_types"]["grad_accum_dtype"] == "fp32"
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert read[key] == "auto"
    whole = read["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
    assert whole == (True if stage == 3 else None)
    offloaded = "cpu" if name.endswith("offload") else "none"
    assert plugin.offload_optimizer_device == plugin.offload_param_device == offloaded


def test_fsdp_saves_the_model_when_training_ends():
    """transformers' save_model writes nothing under FSDP unless the state dict is a full one."""
    settings = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_json_files_belong_to_a_yaml_file():
    for path in FOLDER.glob("*.json"):
        json.loads(path.read_text())
        assert path.with_suffix(".yaml").is_file()
