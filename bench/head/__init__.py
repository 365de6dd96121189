"""The head against its peers: `python -m bench.head`.

Imports `lib`. Start in `harness`; `providers` lists the heads, `active` (a command too) counts what
routing leaves on a model's own hidden states.
"""
