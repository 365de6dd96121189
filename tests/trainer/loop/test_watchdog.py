"""The thread that tells the job's store where a rank is."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.watchdog import Watchdog, missing_ranks


def test_its_thread_is_over_when_training_is(tmp_path, monkeypatch):
    """A thread inside the store when the interpreter ends aborts the process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        arguments = SimpleNamespace(world_size=2, process_index=0, ddp_timeout=0.2)
        trainer: Any = SimpleNamespace(
            args=arguments,
            state=SimpleNamespace(global_step=0),
            add_callback=lambda callback: None,
            remove_callback=lambda callback: None,
        )
        slow = threading.Event()

        def tell(self: Watchdog) -> None:
            slow.set()
            threading.Event().wait(0.3)

        monkeypatch.setattr(Watchdog, "_tell", tell)
        with Watchdog(trainer) as watchdog:
            assert slow.wait(5)
            thread = watchdog._thread
        assert thread is not None
        assert not thread.is_alive()
    finally:
        dist.destroy_process_group()


def test_a_rank_has_begun_from_the_first_moment(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trainer: Any = SimpleNamespace(
            args=SimpleNamespace(world_size=2, process_index=0, ddp_timeout=1000),
            state=SimpleNamespace(global_step=0),
            add_callback=lambda callback: None,
            remove_callback=lambda callback: None,
        )
        with Watchdog(trainer) as watchdog:
            told = watchdog._told(0)
        assert told is not None
        assert told["step"] == 1
    finally:
        dist.destroy_process_group()


def test_a_rank_that_ends_before_training_is_said_in_one_line():
    args: Any = SimpleNamespace(world_size=2, process_index=0)
    gloo = "[pair.cc:553] Connection closed by peer [127.0.0.1]:35246. Check the logs\nof all"
    with pytest.raises(UserError, match=r"^rank 0: look at the logs .*35246"), missing_ranks(args):
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="of our own"), missing_ranks(args):
        raise RuntimeError("of our own")
    args.world_size = 1
    with pytest.raises(RuntimeError, match="closed by peer"), missing_ranks(args):
        raise RuntimeError(gloo)
