"""``python -m bench.studies``, see `command`."""

from bench.studies.command import main

if __name__ == "__main__":
    raise SystemExit(main())
