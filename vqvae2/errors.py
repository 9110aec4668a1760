"""The one exception that speaks to a person: what is wrong, where, and what to do about it."""


class UserError(ValueError):
    """Input or a setting that cannot work.

    The message is one line; it names the file or key, says what was expected, and gives the way out. The command line
    prints it without a traceback and leaves with exit status 2; in Python it is an ordinary `ValueError`.
    """


class Stopped(Exception):
    """A signal asked the process to leave; its work is saved, and the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number
