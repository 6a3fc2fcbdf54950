"""Values of the command line that the command's own parser reads too kindly."""

from collections.abc import Sequence
from typing import Any


def whole(_type: Any, tokens: Sequence[Any]) -> int:
    """A whole number; 1.5 is refused, not rounded. Raises ValueError."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a whole number") from None
