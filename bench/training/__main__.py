"""``python -m bench.training``, see `command`."""

from bench.training.command import main

if __name__ == "__main__":
    raise SystemExit(main())
