"""Images in prompts: where rows have them, and the tokens that stand for them.

May import what the rows of data import. `columns` takes images from rows, and from nowhere else,
and shows them in messages; `processor` has the model's own processor, which says how many tokens
an image becomes and makes its pixel values. `packing.images` adds these to a batch.
"""
