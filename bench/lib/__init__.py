"""What all benchmarks share: cases, exact results, timing, memory, records, tables.

Imports nothing of the other rooms.
"""
