"""`widemargin plan`: memory and time of a run on given GPUs, before it starts.

A companion: the core does not import it. Start in `command`.
"""
