"""The frozen reference model, and its log-probs kept on disk.

May import the rooms below: objectives to model. Start in `model`; `source` gets the frozen model,
and `cache` keeps its log-probs.
"""
