"""How pairs are laid out for the decoder: padded, packed, or with a shared prompt.

May import settings and data. Start in `collator`.
"""
