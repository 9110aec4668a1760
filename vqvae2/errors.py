"""The one exception that speaks to a person: what is wrong, where, and what to do about it."""


class UserError(ValueError):
    """Input or a setting that cannot work.

    The message is one line; it names the file or key, says what was expected, and gives the way out. The command line
    prints it without a traceback and leaves with exit status 2; in Python it is an ordinary `ValueError`.
    """
