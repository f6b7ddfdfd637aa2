"""Contains the checks that `tiedlora check-gpu` and `pytest -m gpu` run. Each part has a test module `test_PART.py`.

A check stores its results as properties of pytest's report: measured values, and warnings if a time or size is
larger than expected. A warning and the message of a failed assertion tell the user what to do.
"""
