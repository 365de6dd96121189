"""``python -m bench.studies``, see `command`."""

import sys

from bench.studies.command import main

if __name__ == "__main__":
    sys.exit(main())
