"""What TRL's own tests do with its trainers, tried with this project's: it runs, or says a remedy.

`python -m tests.trl_situations` tries all and prints how many did which.
"""
