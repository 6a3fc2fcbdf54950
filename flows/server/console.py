"""The console of every command. What it prints is text: square brackets and colons in a path are no markup."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from functa.storage.errors import printable


class _TextConsole(Console):
    """Shows strings as they are; what a terminal would obey, such as an escape sequence in a name, is spelt out."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the string's text, whoever printed it: a line or a table's cell."""
        return super().render_str(printable(text), **options)


def text_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that prints strings as they are; `options` are those of rich's Console."""
    return _TextConsole(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def print_line(text: str, *, error: bool = False) -> None:
    """Print one line as it is, whatever its names hold."""
    print(printable(text), file=sys.stderr if error else sys.stdout)
