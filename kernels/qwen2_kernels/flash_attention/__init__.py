"""Attention within fresh prompts, whose keys and values are at hand and need no pool."""
