"""Small trainings that answer a question: `python -m bench.studies`, or `make study`."""
