"""``python -m bench.head``, see `command`."""

import sys

from bench.head.command import main

if __name__ == "__main__":
    sys.exit(main())
