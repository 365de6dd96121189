"""Hostile weeks: kills, damage, strange inputs; `python -m tests.robustness.torture`."""
