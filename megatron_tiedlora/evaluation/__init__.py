"""Greedy decoding, and the metrics of the tasks."""
