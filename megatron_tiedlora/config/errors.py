"""The one error type that stands for a user's mistake."""


class UserError(ValueError):
    """A wrong input, told in one line that names the file, the value and the fix.

    Commands print its message without a traceback and exit with status 2.
    """
