"""Kernels compiled for real chips without one: resources, and tuning of tile sizes.

Imports `lib`. Two commands, `resources` and `tune`; start in `triton_compile`.
"""
