"""What goes wrong, as one line on standard error and an exit status; with ``--debug`` as Python tells it."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from .naming import as_options
from .speaking import is_first, say

BAD, FALLS_SHORT, INTERRUPTED = 2, 1, 130
"""Exit status for wrong use or bad input, for a comparison or a number that falls short, and after Ctrl-C."""


@contextmanager
def in_one_line(*, debug: bool, after: str = "") -> Iterator[None]:
    """Let an error inside, also one of writing what was printed, end the process with one line and status 2.

    Args:
        debug: whether Python's own report comes before that line.
        after: what to know after Ctrl-C.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        if is_first():
            say(f"interrupted{after}")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        say(said(error))
        sys.exit(BAD)


def said(error: BaseException) -> str:
    """An error in one line: its text with options named as such, and its type if that alone may say too little."""
    text = as_options(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    known = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text
    return text if known else f"{type(error).__name__}: {text}"
