"""Exceptions for users."""


class UserError(ValueError):
    """Invalid input or an invalid setting.

    The message is one line: the file or key, what is wrong, and how to fix it. The command line prints it without a
    traceback and exits with status 2. In Python it is an ordinary `ValueError`.
    """


class Stopped(Exception):
    """A signal stopped the process after its work was saved.

    Args:
        message: One line that says how to resume.
        signal_number: The signal. The exit status is 128 plus this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number
