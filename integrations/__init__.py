"""The head inside other people's trainers.

May import the trainer and the kernels; neither imports this folder. Each module is for one library,
which it imports when it is used: `trl` for TRL's trainers, `transformers` for the plain Trainer.
"""
