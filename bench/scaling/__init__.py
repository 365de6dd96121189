"""How head and steps scale: `python -m bench.scaling`. Start in `curves`."""
