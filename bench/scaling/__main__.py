"""``python -m bench.scaling``, see `curves`."""

import sys

from bench.scaling.curves import main

if __name__ == "__main__":
    sys.exit(main())
