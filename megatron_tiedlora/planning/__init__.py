"""Predict the stages, FLOPs, memory, messages and time of a layout."""
