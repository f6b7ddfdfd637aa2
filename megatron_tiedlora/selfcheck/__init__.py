"""The tests that `tiedlora check-gpu` runs, a module `test_PART.py` for each part; `pytest -m gpu` runs them too.

What they find are properties of pytest's report: figures, and under WARNING what is slower or larger than it should be.
An assertion's message says what to do.
"""
