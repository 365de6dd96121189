"""A command killed by SIGKILL as its file grows, run as ``python -m tests.support.killing``.

The command's modules are imported once; every run is a fork, which no thread of torch precedes.
Printed as JSON: how large the file was after each kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    from widemargin.trainer.cli import main as command
    from widemargin.trainer.evaluation import answer_engines  # noqa: F401  with torch

    arguments, grown, sizes = json.loads(sys.argv[1])
    seen = []
    for size in [*sizes, None]:
        child = os.fork()
        if not child:
            os._exit(command(arguments))
        while size is not None and os.waitpid(child, os.WNOHANG) == (0, 0):
            if Path(grown).is_file() and Path(grown).stat().st_size >= size:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        if size is None and os.waitpid(child, 0)[1]:
            sys.exit("the command failed")
        seen.append(Path(grown).stat().st_size)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
