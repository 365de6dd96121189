"""`widemargin quickstart`: make a data set and a tiny model, train it, show what changed.

A companion: it may import `report` and `settings`, and the core does not import it. Start in
`command`.
"""
