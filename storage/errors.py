"""Errors that are shown to people. str(error) is one line that names the thing, the fault and the fix."""

import re
from typing import ClassVar

CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")  # in an address


def printable(text: str) -> str:
    """Return the text with spelt out what a terminal or a page would obey and not show: \\x1b, \\n, \\u202e.

    Without credentials: an endpoint, a proxy or an API may be given as https://user:password@host.
    """
    if "@" in text:
        text = CREDENTIALS.sub("...@", text)
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def one_line(error: BaseException) -> str:
    """Return the error's message on one line, or its type's name where it has no message."""
    return printable(" ".join(str(error).split())) or type(error).__name__


class FunctaError(Exception):
    """An error whose message is all that a user needs: the command prints it as one line, without its type.

    Storage is the lowest layer that raises such errors, so the class is here and every layer above derives from it.
    """

    exit_status: ClassVar[int] = 1  # of the command; 2 where arguments or config alone are wrong

    def __init__(self, message: str) -> None:
        # One line, whatever a library put into its own message; and names of files may hold anything.
        super().__init__(printable(" ".join(line.strip() for line in message.splitlines())))


class StorageError(FunctaError):
    """A fault outside the program: a missing folder, a full disk, a damaged object."""


class TransientError(StorageError):
    """The connection broke, timed out, or the server was busy or failed: the same call may succeed later."""


class MissingObject(StorageError):
    """No object of that name exists."""


class DamagedObject(StorageError):
    """An object differs from its record: short, altered, swapped or unreadable."""
