"""`widemargin doctor`: what is installed, what a run would use, whether the kernels work.

A companion: it may import the core, and the core does not import it. Start in `command`.
"""
