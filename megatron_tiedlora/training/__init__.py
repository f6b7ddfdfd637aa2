"""A training run: its plan, data, model and engine, the step, the loop, checks, resuming and the end."""
