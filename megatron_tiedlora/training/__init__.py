"""Run the training: start, model and engine, step, loop, checks, resume, and end."""
