"""``python -m bench.planning``, see `command`."""

from bench.planning.command import main

if __name__ == "__main__":
    raise SystemExit(main())
