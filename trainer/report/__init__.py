"""A run's report, for reading: an HTML page or a PNG of one run, or of several in comparison.

A companion: the core does not import it, other companions may. It reads runs by
`monitor.history`. Start in `write`. `run_page` and `compare` choose what is shown; `charts` and
`ridges` lay each chart out once, as the marks of `marks`, which `svg` and `png` draw.
"""
