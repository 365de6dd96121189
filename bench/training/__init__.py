"""Whole training steps against other trainers: `python -m bench.training`.

Imports `lib`. Start in `command`, which has a `worker` take each contender's steps.
"""
