"""``python -m bench.report``, see `pages`."""

import sys

from bench.report.pages import main

if __name__ == "__main__":
    sys.exit(main())
