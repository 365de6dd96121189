"""Checkpoints that are complete or absent, which run they belong to, and the model's card.

May import settings, objectives, data, model, reference and monitor. Start in `files`; `resume`
chooses the checkpoint to go on from, `same_run` has the table of what must be as it was, and
`claim` keeps the output folder for one run.
"""
