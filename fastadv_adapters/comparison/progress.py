"""What is being done, in one line of the terminal."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from ..modules import accept_flag

if TYPE_CHECKING:
    from typing_extensions import Self


class Progress:
    """A line on standard error that says what is being done; nothing if that is no terminal, or without rich."""

    def __init__(self, wanted: bool) -> None:
        accept_flag("progress", wanted)
        self._status = None
        if wanted and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console

            self._status = Console(stderr=True).status("compare")

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """What is done from now on."""
        if self._status is not None:
            self._status.update(what)
