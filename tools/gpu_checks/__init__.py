"""What tools/check_gpu.py checks: one module a part, with `check(report, options)`.

`records` is what they find, `package` is all that they take from the package beside settings and plans.
"""
