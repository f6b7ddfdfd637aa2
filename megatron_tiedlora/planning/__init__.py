"""Arithmetic that predicts what a layout costs: stages, FLOPs, memory and messages."""
