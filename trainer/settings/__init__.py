"""Every setting of a run: dataclasses, their checks, YAML files and overrides.

May import `objectives` (for their hyperparameters) and nothing above. Start in `config`.
"""
