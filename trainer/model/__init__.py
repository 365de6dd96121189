"""The model: loading it, the head without logits inside it, adapters, merging.

May import settings, data and packing. Start in `head`.
"""
