"""What all benchmarks share; imports no other room.

Inputs and the fp64 answer (`cases`, `peaked`, `exact`, `subject`), measuring (`timing`, `profile`,
`workers`), and what becomes of it (`record`, `table`, `plots`). Start in `record`.
"""
