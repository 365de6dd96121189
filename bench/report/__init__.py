"""Pages and pictures made from `bench/results`: `python -m bench.report`.

Imports every room that has tables or pictures of its rows; only `all` imports it. Start in `pages`.
"""
