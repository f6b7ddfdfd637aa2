"""Tasks, prompts, tokenisation and the deterministic loader."""
