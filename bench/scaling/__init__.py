"""How the head and whole steps scale: `python -m bench.scaling`.

Imports `lib`, the providers of `head` and the workers of `training`. Start in `curves`.
"""
