"""A run's report, for reading: HTML, PNG, comparisons, the model card.

A companion: the core does not import it. Start in `write`.
"""
