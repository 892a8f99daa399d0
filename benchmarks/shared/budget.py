"""How long a part of a benchmark may take."""

import time
from contextlib import AbstractContextManager, nullcontext

from benchmarks.shared.deadline import deadline

NO_TIME = "left out, for the time was used up; --minutes gives more"
"""Why something is not measured."""


class Budget:
    """Seconds that a part of a benchmark may take.

    Args:
        seconds: from now on.
        hard: whether :meth:`held` stops what takes longer; shares of a hard budget are hard, too.
    """

    def __init__(self, seconds: float, *, hard: bool = False) -> None:
        self.seconds = seconds
        self.hard = hard
        self.start = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds that are left; negative once it is used up."""
        return self.seconds - (time.perf_counter() - self.start)

    def share(self, part: float) -> "Budget":
        """A budget of its own with a part, 0 to 1, of what is left."""
        return Budget(max(self.left, 0.0) * part, hard=self.hard)

    def held(self) -> AbstractContextManager[None]:
        """A context that a hard budget ends when it is used up, with an OutOfTimeError."""
        return deadline(self.left) if self.hard else nullcontext()
