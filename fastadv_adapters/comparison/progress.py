"""What is being done, in one line of the terminal."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..modules import accept_flag


@contextmanager
def progress_shown(wanted: bool) -> Iterator[Callable[[str], None]]:
    """Gives what says what is done from now on; it says nothing if standard error is no terminal, or without rich."""
    accept_flag("progress", wanted)
    if wanted and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        with Console(stderr=True).status("compare") as status:
            yield status.update
    else:
        yield lambda what: None
