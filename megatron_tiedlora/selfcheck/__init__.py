"""The tests that `tiedlora check-gpu` and `pytest -m gpu` run. Each part has a module `test_PART.py`.

Results are stored as properties of pytest's report: measured values, and under WARNING what to do if a value is slower
or larger than expected. An assertion's message also says what to do.
"""
