"""Optimizer, schedule, the loop, logs, stopping and resuming."""
