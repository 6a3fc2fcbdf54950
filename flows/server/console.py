"""The console of every command. What it prints is text: square brackets and colons in a path are no markup."""

from typing import Any

from rich.console import Console


def text_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that prints strings as they are; `options` are those of rich's Console."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
