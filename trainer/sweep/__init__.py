"""`widemargin sweep`: a run for every combination of values, and a report that compares them.

A companion: it may import `report`, `monitor`, `settings`, `checkpoint`, `errors` and `files`. The
runs are processes of their own. Start in `command`.
"""
