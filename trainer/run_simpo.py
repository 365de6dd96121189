"""``-m widemargin.trainer.run_simpo CONFIG.yaml [--key=value ...]``, as launchers start it.

The twin of the SimPO repository's ``scripts/run_simpo.py``: the objective is simpo where
the settings name none; ``loss_type: hinge`` is its hinge form.
Otherwise as ``widemargin train``; see `settings.published.objective`.
"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], script="run_simpo"))
