"""Generates answers greedily or by sampling, and scores them with the metrics of the tasks."""
