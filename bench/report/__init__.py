"""Pages and pictures made from `bench/results`: `python -m bench.report`. Start in `pages`."""
