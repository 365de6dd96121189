"""How this process was started: alone, or by a launcher as one of several."""

from __future__ import annotations

import os

from ..errors import UserError

RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers tell a process its number."""

ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def has_launcher() -> bool:
    """Whether a launcher started this process: it then has a rank."""
    return any(name in os.environ for name in RANKS)


def check_left_over() -> None:
    """Raise ``UserError`` for an engine that an earlier launch left in this shell's variables."""
    for name in ENGINES if not has_launcher() else ():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"unset {name}, which asks for several processes, and no launcher started this "
                "one; or start it with accelerate launch or torchrun"
            )


def leave_group() -> None:
    """End this process's part in the job's process group, if it has one.

    Left to the interpreter's end, the group's threads now and then abort the process.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
