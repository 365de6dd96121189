"""Preference data: sources, rendering, tokenization and collation."""
