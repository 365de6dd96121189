"""transformers' loop made safe: planned batches, whole checkpoints, guards, a watchdog.

May import every room of the core. Start in `planned`.
"""
