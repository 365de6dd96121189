"""Which ranks share a row of tokens, and which have other pairs: sequence and data parallelism.

May import errors alone. Start in `groups`: a rank's place and the process groups. `rows` splits a
row, and exchanges heads for tokens around attention. `packing.split` refuses what cannot be split.
"""
