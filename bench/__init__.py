"""Benchmarks: every figure in the README and docs comes from here. Start in `all`."""
