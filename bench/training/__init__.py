"""Whole training steps against other trainers: `python -m bench.training`. Start in `command`."""
