"""Reads the data of a task, makes prompts, tokenises samples and loads them in a deterministic order."""
