"""What `PreferenceTrainer` adds to transformers' loop besides the step.

`batches` deals pairs, `checkpoints` saves and resumes, `nonfinite` guards updates, `weights` guards
what is saved, `engine` compares DeepSpeed's file with the settings, `collapse` warns and stops,
`preemption` handles SIGTERM, `watchdog` names the rank that others wait for, `outputs` writes what
a run leaves.

May import every room of the core. Start in `trainer.trainer`, then `batches` and `checkpoints`.
"""
