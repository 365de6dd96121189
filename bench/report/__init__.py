"""Pages and pictures made from `bench/results`: `python -m bench.report`.

Imports `lib`, and `head`, `training`, `planning` and `scaling` for their tables and pictures; only
`all` imports it. Start in `pages`.
"""
