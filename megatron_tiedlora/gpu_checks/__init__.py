"""The checks of tiedlora check-gpu: one module per part, with `check(report, options)`.

`records` has the findings; `package` has all that the parts use of the package besides settings and plans.
"""
