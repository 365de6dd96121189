"""`widemargin doctor`: what is installed, what a run would use, whether the kernels work.

A companion: the core does not import it. Start in `machine`.
"""
