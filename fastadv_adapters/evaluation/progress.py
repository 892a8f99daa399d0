"""How far an evaluation is: one bar, or plain lines where the output is no terminal."""

import sys
import time
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
        show: whether anything is shown.
    """

    def __init__(self, total: int, done: int, broken: int, *, show: bool) -> None:
        self._total, self._before, self._broken_before = total, done, broken
        self._show = show
        self._bar: Any = None
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._show and sys.stderr.isatty():
            self._bar = self._made()
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
        done, total = count.finished, self._before + count.finished
        begun, broken = self._before + max(count.begun, done), self._broken_before + count.broken
        robust = f"{100 * (1 - broken / max(1, begun)):.1f} % robust"
        if self._bar is not None:
            self._bar.update(0, completed=total, robust=robust)
            return
        now = time.monotonic()
        if now - self._last < EVERY and not last:
            return
        self._last = now
        rate = done / max(1e-9, now - self._begun)
        left = f", {(self._total - total) / rate:.0f} s left" if rate and total < self._total else ""
        sys.stderr.write(f"evaluate: {total}/{self._total} samples, {robust}, {rate:.1f} samples/s{left}\n")
        sys.stderr.flush()

    def _made(self) -> Any:
        rich, console = need("rich.progress", extra="evaluate"), need("rich.console", extra="evaluate")
        columns = [
            rich.TextColumn("evaluate"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[robust]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        ]
        bar = rich.Progress(*columns, console=console.Console(stderr=True))
        bar.add_task("", total=self._total, completed=self._before, robust="")
        bar.start()
        return bar
