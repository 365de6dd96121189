"""What a run measures and shows while it trains: metrics, speed, samples, its record.

May import settings, objectives, data, model and reference. Start in `observer`.
"""
