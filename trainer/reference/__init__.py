"""The frozen reference model, and its log-probs kept on disk.

May import the rooms below: settings to batching, and model. Start in `model`.
"""
