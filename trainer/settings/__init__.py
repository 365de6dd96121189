"""Every setting of a run: dataclasses, their checks, YAML files and overrides.

`config` has `PreferenceConfig`, of the dataclasses in `model` and `data`;
`files` reads one from a YAML file and overrides; `published` translates other projects' names.
May import the kernels' constants, `errors`, `text` and `objectives` (for their hyperparameters),
and no other room. Start in `config`.
"""
