"""``python -m widemargin.trainer CONFIG.yaml [--key=value ...]``, as launchers start it."""

import sys

from .cli import main

sys.exit(main(["train", *sys.argv[1:]]))
