"""From rows to micro-batches: steps, micro-batches and each rank's share of the pairs.

May import settings, objectives, data and packing. Start in `pipeline`, which a trainer builds once;
`planner` has the algorithm.
"""
