"""``-m widemargin.trainer.run_lmpo CONFIG.yaml [--key=value ...]``, as launchers start it.

The twin of the LMPO repository's ``scripts/run_lmpo.py``: the objective is lmpo where
the settings name none, and ``loss_type: sigmoid`` means it.
Otherwise as ``widemargin train``; see `settings.published.objective`.
"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], script="run_lmpo"))
