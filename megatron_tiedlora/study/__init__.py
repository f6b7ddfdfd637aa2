"""The paper's study on a model and task of one's own: its grid of runs, their scores, tables and figures."""
