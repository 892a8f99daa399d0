"""Work that is stopped when its time is up, wherever it is."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = "stopped, for its time was up; --minutes gives more"
"""Why something that was begun is not measured."""

_AGAIN = 5.0  # seconds until the next attempt: an error that is raised while an object is finalised goes nowhere


class OutOfTimeError(BaseException):
    """The time is up. It is no Exception, so neither the package nor a compiler takes it for a fault of the model."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the code inside once the seconds are over, as soon as Python runs again.

    A call of the C library is not cut short: a kernel or a search for the fastest algorithm ends first. A deadline may
    stand inside a longer one. Timers are the main thread's, and some systems have none: elsewhere nothing is stopped.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTimeError(STOPPED)

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), _AGAIN)
