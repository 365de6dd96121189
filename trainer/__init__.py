"""Preference training: objectives, data, model head, trainer, command line and reports."""
