"""Checkpoints that are complete or absent, which run they belong to, and the model's card.

May import settings, objectives, data, model, reference and monitor. Start in `files`; `resume`
keeps the output folder for one run and chooses the checkpoint that it goes on from, and `same_run`
has the table of what must be as it was.
"""
