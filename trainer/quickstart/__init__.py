"""`widemargin quickstart`: data, a tiny model, a training and its report.

A companion: the core does not import it. Start in `command`.
"""
