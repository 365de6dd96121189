"""Two processes on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script or ``-m MODULE`` with its arguments on two ranks that work in ``folder``.

    torchrun takes a free port by itself, so any number of launches may run side by side.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
