"""``-m widemargin.trainer.run_xpo CONFIG.yaml [--key=value ...]``, as launchers start it.

The twin of the gamma-PO repository's ``scripts/run_xpo.py``: ``loss_type`` and
``trainer_type`` say what is trained.
Otherwise as ``widemargin train``; see `settings.published.objective`.
"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], script="run_xpo"))
