"""The paper's study on any model and task: a grid of runs, their scores, tables and figures."""
