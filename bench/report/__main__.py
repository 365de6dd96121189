"""``python -m bench.report``, see `pages`."""

from bench.report.pages import main

if __name__ == "__main__":
    raise SystemExit(main())
