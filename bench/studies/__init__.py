"""Small trainings that answer a question: `python -m bench.studies`, or `make study`.

Imports `lib` and the pairs of `training`. Start in `questions`, then `command`.
"""
