"""``python -m bench.head``, see `command`."""

from bench.head.command import main

if __name__ == "__main__":
    raise SystemExit(main())
