"""Offering the nearest known name in place of an unknown one."""

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str]) -> str:
    """Tail of a message about an unknown name: the nearest known one and all of them."""
    close = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    match = next((item for item in known if close and item.lower() == close[0]), None)
    guess = f"; did you mean {match}?" if match else ";"
    return f"{guess} known are {', '.join(known) or 'none'}"
