"""Shipped configurations: `train/` for runs, `accelerate/` for launchers."""
