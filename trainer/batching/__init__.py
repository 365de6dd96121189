"""Which pairs run together: steps, micro-batches and each rank's share.

May import settings, objectives, data and packing. Start in `planner`.
"""
