"""Greedy decoding and the tasks' metrics."""
