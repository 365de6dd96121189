"""Errors that speak to the user."""


class UserError(ValueError):
    """Bad input: one line that names the thing, what was expected, what came and what to do.

    The command line prints it as ``error: ...`` and exits with code 2.
    """
