"""Generates answers by greedy decoding, and scores them with the metrics of the tasks."""
