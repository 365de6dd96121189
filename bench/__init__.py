"""Benchmarks: every figure in the README and docs comes from here.

May import all of widemargin, and nothing of the tests. The rooms, from the bottom: `lib`; `head`,
`training` and `compile`; `planning`, `scaling` and `studies`, which measure with those; `report`;
and `all`, which runs everything a CPU can. Start in `all`, or in a room's `command`.
"""
