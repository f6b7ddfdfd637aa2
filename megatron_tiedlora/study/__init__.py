"""Repeats the paper's study on any model and task: trains and scores a grid of runs, and makes tables and figures."""
