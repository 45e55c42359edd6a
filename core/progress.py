"""The one look of progress bars."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(over: Iterable[Any] | None = None, what: str | None = None, **how: Any) -> "tqdm[Any]":
    """tqdm, as wide as the terminal; into a file it writes every ten seconds, and not five times a second."""
    return tqdm(over, what, dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10, **how)
