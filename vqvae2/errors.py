"""Exceptions for users, and the escaping of text that they are shown."""

import re

# Control characters, line separators, and surrogates, which stand for bytes that are not UTF-8.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """Invalid input or an invalid setting.

    The message is one line: the file or key, what is wrong, and how to fix it. The command line prints it without a
    traceback and exits with status 2. In Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Stopped(Exception):
    """A signal stopped the process after its work was saved.

    Args:
        message: One line that says how to resume.
        signal_number: The signal. The exit status is 128 plus this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


def printable(text: str) -> str:
    r"""Return text that is safe to print, with escapes for control characters and for bytes that are not UTF-8.

    >>> print(printable("caf\udce9\x1b[2J.png"))
    caf\xe9\x1b[2J.png
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if "\udc80" <= character <= "\udcff":  # how Python decodes bytes of file names that are not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
