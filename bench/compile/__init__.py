"""Kernels compiled for real chips without one: resources, and tuning of tile sizes."""
