"""`widemargin generate`, `score` and `pair`: preference pairs from a model's own answers.

`generate` writes prompts and answers to a folder, `score` adds a file of scores, and `pair` makes
training data of both. All three go on where they were stopped.

A companion, above `evaluation`, whose records, engines and chat client it uses. Start in `command`.
"""
