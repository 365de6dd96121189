"""Checkpoints that are complete or absent, and which run they belong to.

May import settings, model and reference. Start in `files`.
"""
