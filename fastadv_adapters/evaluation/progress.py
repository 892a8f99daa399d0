"""How far an evaluation is: one bar, or plain lines if the output is no terminal or there is no rich."""

import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any

from .sharing import Count

EVERY = 10.0
"""Seconds between two plain lines."""

TELLING = 16
"""After so many finished samples the speed is known well enough to tell how long the rest takes."""


@dataclass
class Progress:
    """Shows how many samples are finished, and the robust accuracy among them.

    Attributes:
        total: how many samples there are.
        done: how many are finished already.
        broken: how many of those do not stand.
        begun: how many had been begun when the call before was stopped, finished or not.
        notes: what is said first, for the report may be far away.
        source: the folder that finished samples are read from; None if there is none.
        show: whether anything is shown.
    """

    total: int
    done: int
    broken: int
    _: KW_ONLY
    begun: int = 0
    notes: Sequence[str] = ()
    source: object = None
    show: bool

    def __post_init__(self) -> None:
        self._finished = 0  # in this call
        self._bar: Any = None
        self._since = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        for note in self.notes if self.show else ():
            sys.stderr.write(f"evaluate: note: {note}\n")
        if self.show and self.done == self.total:
            sys.stderr.write(f"evaluate: already finished; report read from {self.source}\n")
            self.show = False  # there is nothing else to tell
        if self.show and sys.stderr.isatty():
            with suppress(ImportError):
                self._bar = self._made()
        if self._bar is not None:
            self.update(Count(0, 0, 0))
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, count: Count, *, last: bool = False) -> None:
        """Show what has been done in this call.

        Broken samples are finished sooner than others, so the robust accuracy is that of all that have begun: whatever
        is on its way stands so far.
        """
        if not self.show:
            return
        self._finished, total = count.finished, self.done + count.finished
        begun = max(self.done + max(count.begun, count.finished), self.begun)
        robust = f"{100 * (1 - (self.broken + count.broken) / begun):.1f} % robust" if begun else ""
        if self._bar is not None:
            self._bar.update(0, completed=total, robust=robust)
        elif last or time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            sys.stderr.write(f"evaluate: {total}/{self.total} samples, {robust}, {self}\n")
            sys.stderr.flush()

    def __str__(self) -> str:
        """How fast this call is by now, and how long the rest takes; what was finished before cost it no time.

        (rich would tell the speed of the last few updates, and samples come in bursts.)
        """
        rate, left = self._finished / max(1e-9, time.monotonic() - self._since), self.total - self.done - self._finished
        rest = f", {timedelta(seconds=round(left / rate))} left" if left and self._finished >= TELLING else ""
        return f"{rate:.1f} samples/s{rest}"

    def _made(self) -> Any:
        rich, console = importlib.import_module("rich.progress"), importlib.import_module("rich.console")
        columns = [
            rich.TextColumn("evaluate"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[robust]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[pace]}"),
        ]
        bar = rich.Progress(*columns, console=console.Console(stderr=True))
        bar.add_task("", total=self.total, completed=self.done, robust="", pace=self)
        return bar
