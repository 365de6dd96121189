"""What happens to pairs before the first step: `python -m bench.planning`.

Tokenizing them and planning batches, against TRL. Imports `lib` and the pairs of `training`. Start
in `command`; `jobs` is what each process does.
"""
