"""``python -m bench.scaling``, see `curves`."""

from bench.scaling.curves import main

if __name__ == "__main__":
    raise SystemExit(main())
