"""How this process was started: alone, or by a launcher as one of several."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers tell a process its number."""

MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which MPI's launchers tell the number of processes."""

ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")

PLACES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun, accelerate and DeepSpeed set all together."""

SAY_AFTER_S = 10

logger = logging.getLogger(__name__)


def has_launcher() -> bool:
    """Whether a launcher started this process: it then has a rank."""
    return any(name in os.environ for name in RANKS)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def check_left_over() -> None:
    """Raise ``UserError`` for an engine that an earlier launch left in this shell's variables."""
    if "ACCELERATE_TORCH_DEVICE" in os.environ:
        raise UserError(
            "unset ACCELERATE_TORCH_DEVICE; use_cpu and CUDA_VISIBLE_DEVICES choose the device here"
        )
    for name in ENGINES if not has_launcher() else ():
        if _is_set(name):
            raise UserError(
                f"unset {name}, which asks for several processes, and no launcher started this "
                "one; or start it with accelerate launch or torchrun"
            )


def check_place() -> int:
    """The number of processes that the variables of launchers tell.

    Raises:
        UserError: some of these variables are there and others are not, as an earlier launch or a
            scheduler left them; or they are no numbers.
    """
    alone = {"WORLD_SIZE": "1", "RANK": "0"}
    given = {name: os.environ[name] for name in PLACES[:3] if os.environ.get(name)}
    if any(name in os.environ for name in MPI) or given.items() <= alone.items():
        return 1
    named = ", ".join(f"{name}={value}" for name, value in given.items())
    missing = [name for name in PLACES if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"unset {named}, which asks for several processes, and no launcher started this one "
            f"({', '.join(missing)} not set); or start it with accelerate launch or torchrun"
        )
    numbers = [os.environ[name] for name in PLACES if name != "MASTER_ADDR"]
    size, rank, _, port = [int(n) if n.isdecimal() else -1 for n in numbers]
    if min(size, rank, port) < 0 or rank >= size or port > 65535:
        raise UserError(
            f"unset {named}, MASTER_PORT={numbers[-1]}, or correct them: expected whole numbers, "
            "RANK below WORLD_SIZE, and a port"
        )
    return size


@contextmanager
def meeting(args: TrainingArguments) -> Iterator[None]:
    """Inside, this process meets the job's others, and says for whom it waits.

    Raises:
        UserError: they did not come within ``ddp_timeout``, or each would train by itself.
    """
    import torch.distributed as dist
    from accelerate import PartialState

    ranks = check_place()
    if ranks == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    place = (
        f"{ranks} processes (WORLD_SIZE) at MASTER_ADDR={os.environ['MASTER_ADDR']}, "
        f"MASTER_PORT={os.environ['MASTER_PORT']}; this is RANK={os.environ['RANK']}"
    )
    limit = timedelta(seconds=args.ddp_timeout)
    telling = threading.Timer(
        SAY_AFTER_S, logger.warning, ("Waits for %s. ddp_timeout: %s", place, limit)
    )
    telling.daemon = True
    telling.start()
    try:
        if args.use_cpu or _is_set("ACCELERATE_USE_CPU"):  # transformers leaves it at 30 minutes
            PartialState(cpu=True, backend=args.ddp_backend, timeout=limit)
        yield
    except RuntimeError as error:
        if dist.is_initialized():
            raise
        raise UserError(
            "start all processes, or unset WORLD_SIZE, RANK and LOCAL_RANK to train in this one "
            f"alone: within {limit} (ddp_timeout) these did not meet: {place}. "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        telling.cancel()
    check_together(args, ranks)


def check_together(args: TrainingArguments, ranks: int) -> None:
    """Raise ``UserError`` where accelerate sees one process alone, as it does without a GPU."""
    if args.world_size != ranks:
        raise UserError(
            f"use_cpu: set it to true; there is no GPU here, and without it each of the {ranks} "
            "processes would train by itself"
        )


def leave_group() -> None:
    """End this process's part in the job's process group, if it has one.

    Left to the interpreter's end, the group's threads now and then abort the process.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
