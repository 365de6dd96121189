"""Engines as accelerate's and DeepSpeed's configs set them up."""

from __future__ import annotations

import json

from widemargin.trainer.plan.engines import read_engine, shipped_engine


def test_engines_as_shipped():
    zero3, zero2, fsdp2, ddp = (shipped_engine(n, 64) for n in ("zero3", "zero2", "fsdp2", "ddp"))
    assert (zero3.name, zero3.gradients_fp32, zero3.processes) == ("zero3", True, 4)
    assert (zero2.name, zero2.gradients_fp32, zero2.overlap) == ("zero2", True, True)
    assert (fsdp2.name, ddp.name) == ("fsdp2", "ddp")


def test_deepspeeds_own_settings_are_read(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": "auto",
                    "sub_group_size": 1e7,
                    "offload_optimizer": {"device": "cpu"},
                }
            }
        )
    )
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    )
    engine = read_engine(file, 64)
    assert engine.reduce_bucket == 64 * 64
    assert engine.sub_group == 10_000_000
    assert engine.optimizer_on_cpu
    assert not engine.gradients_fp32
