"""`widemargin plan`: an estimate of a run's memory and time on given GPUs, before it starts.

A companion: it may import the core, and the core does not import it. `command` parses the command
line; `estimate` works out what `text` prints. A `Scenario` is the run's settings on so many ranks
of an engine: `simulation` tells what a micro-batch holds, `memory` what a rank holds, `speed` how
long a step takes. "Plan" alone means an epoch's micro-batches, as in `batching`. Start in
`estimate`.
"""
