"""What `PreferenceTrainer` adds to transformers' loop besides the step.

`arguments` checks what it is given, `batches` deals pairs, `checkpoints` saves and resumes,
`nonfinite` guards updates and what is saved, `stopping` handles SIGTERM and a collapse, `watchdog`
names the rank that others wait for, `outputs` writes what a run leaves.

May import every room of the core. Start in `trainer.trainer`, then `batches` and `checkpoints`.
"""
