"""How far an evaluation is: one bar, or plain lines where the output is no terminal."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from ..modules import need
from .sharing import Count

EVERY = 10.0
"""Seconds between two plain lines."""


class Progress:
    """Shows how many samples are finished, and the robust accuracy among them.

    Args:
        total: how many samples there are.
        done: how many are finished already.
        broken: how many of those do not stand.
        notes: what is said first, for the report may be far away.
        show: whether anything is shown.
    """

    def __init__(self, total: int, done: int, broken: int, notes: Sequence[str] = (), *, show: bool) -> None:
        self._total, self._before, self._broken_before = total, done, broken
        self._notes, self._show = notes, show
        self._bar: Any = None
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        for note in self._notes if self._show else ():
            sys.stderr.write(f"evaluate: note: {note}\n")
        if self._show and sys.stderr.isatty():
            self._bar = self._made()
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, count: Count, *, last: bool = False) -> None:
        """Show what has been done in this call.

        Broken samples are finished sooner than others, so the robust accuracy is that of all that have begun: whatever
        is on its way stands so far.
        """
        if not self._show:
            return
        total = self._before + count.finished
        begun, broken = self._before + max(count.begun, count.finished), self._broken_before + count.broken
        robust = f"{100 * (1 - broken / max(1, begun)):.1f} % robust"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(0, completed=total, robust=robust, pace=self._pace(count.finished, now))
        elif last or now - self._last >= EVERY:
            self._last = now
            sys.stderr.write(f"evaluate: {total}/{self._total} samples, {robust}, {self._pace(count.finished, now)}\n")
            sys.stderr.flush()

    def _pace(self, done: int, now: float) -> str:
        """How fast this call is, and how long the rest takes; what an earlier call has finished cost it no time.

        (rich would tell the speed of the last few updates, and samples come in bursts.)
        """
        rate, left = done / max(1e-9, now - self._begun), self._total - self._before - done
        rest = f", {timedelta(seconds=round(left / rate))} left" if left and rate else ""
        return f"{rate:.1f} samples/s{rest}"

    def _made(self) -> Any:
        rich, console = need("rich.progress", extra="evaluate"), need("rich.console", extra="evaluate")
        columns = [
            rich.TextColumn("evaluate"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[robust]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[pace]}"),
        ]
        bar = rich.Progress(*columns, console=console.Console(stderr=True))
        bar.add_task("", total=self._total, completed=self._before, robust="", pace="")
        return bar
