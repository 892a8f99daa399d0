"""Who attacks which samples: one process all of them, or several that take chunks from a counter.

Under ``torchrun`` processes meet in the store of its process group (Python's ``torch.distributed``); no collective
runs. A process that falls silent is held dead, and what it had taken is taken again.
"""

import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

CHUNK = 16
"""How many samples are taken at once, at most."""

SILENT = 30.0
"""After so many seconds without a sign of life a process is held dead. (One that was only slow computes twice what
another has taken from it; results are the same.)"""

_ERRORS = {kind.__name__: kind for kind in (TypeError, ImportError, OSError, RuntimeError)}
"""Errors of one process that are raised as they are in the others; for all else there is ValueError."""

_BEAT = 1.0
_POLL = 0.05


class Count(NamedTuple):
    """What all processes of this call have done.

    Attributes:
        begun: samples that are or were on their way.
        finished: samples among them that are on disk.
        broken: finished samples that do not stand.
    """

    begun: int
    finished: int
    broken: int


class Sharing:
    """The processes of one evaluation: here one alone.

    Attributes:
        rank: of this one; that of rank 0 reports.
        world: how many there are.
    """

    rank, world = 0, 1

    def __init__(self) -> None:
        self._begun = self._finished = self._broken = 0

    def plan(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 makes, for all; its error is everybody's."""
        return make()

    def chunks(self, todo: list[int]) -> Iterator[list[int]]:
        """Samples that this process is to attack, until nobody has to begin with any."""
        for first in range(0, len(todo), CHUNK):
            yield todo[first : first + CHUNK]

    def inherited(self, finished: Callable[[], set[int]]) -> list[int] | None:
        """Samples of a process that died, once this one has finished all of its own; None if all are finished."""
        return None

    def begin(self, count: int) -> None:
        """Say that so many samples are on their way."""
        self._begun += count

    def done(self, indices: list[int], broken: int) -> Count:
        """Say that samples are on disk, and how many of them are broken; returns what all have done by now."""
        self._finished += len(indices)
        self._broken += broken
        return Count(self._begun, self._finished, self._broken)

    def close(self, merge: Callable[[], None]) -> None:
        """Let the lowest rank that is alive merge, once, and wait for that."""
        merge()

    def leave(self) -> None:
        """Fall silent after an error: the others take what is left, and do not wait for this process."""


class Together(Sharing):
    """Several processes, each with this object, on one ``store`` of ``torch.distributed``."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__()
        self._store, self.rank, self.world = store, rank, world
        self._chunks: list[list[int]] = []
        self._chunk_of: dict[int, int] = {}
        self._left: dict[int, set[int]] = {}
        self._stop = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}

    def plan(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """From rank 0 through the store."""
        if self.rank == 0:
            try:
                plan = make()
            except Exception as error:
                self._store.set("plan", json.dumps({"error": [type(error).__name__, str(error)]}))
                self._wait_until_told()
                raise
            self._store.set("plan", json.dumps({"plan": plan}))
        while not self._store.check(["plan"]):
            time.sleep(_POLL)
        got: dict[str, Any] = json.loads(self._store.get("plan"))
        if "error" in got:
            self._store.set(f"told/{self.rank}", "1")
            kind, text = got["error"]
            theirs: Exception = _ERRORS.get(kind, ValueError)(text)
            raise theirs
        threading.Thread(target=self._beat, daemon=True).start()
        return dict(got["plan"])

    def chunks(self, todo: list[int]) -> Iterator[list[int]]:
        """Chunks from the counter: a fast process takes more."""
        size = max(1, min(CHUNK, -(-len(todo) // (4 * self.world))))
        self._chunks = [todo[first : first + size] for first in range(0, len(todo), size)]
        while (number := self._store.add("next", 1) - 1) < len(self._chunks):
            self._store.set(f"owner/{number}", str(self.rank))
            yield self._taken(number, self._chunks[number])

    def inherited(self, finished: Callable[[], set[int]]) -> list[int] | None:
        """Wait until somebody dies, or all is finished."""
        while left := [n for n in range(len(self._chunks)) if not self._store.check([f"done/{n}"])]:
            for number in filter(self._inherits, left):
                known = finished()
                if rest := [index for index in self._chunks[number] if index not in known]:
                    return self._taken(number, rest)
                self._store.set(f"done/{number}", "1")
            time.sleep(_POLL)
        return None

    def begin(self, count: int) -> None:
        """Count."""
        self._store.add("begun", count)

    def done(self, indices: list[int], broken: int) -> Count:
        """Mark chunks of which every sample is on disk."""
        for index in indices:
            number = self._chunk_of[index]
            self._left[number].discard(index)
            if not self._left[number]:
                self._store.set(f"done/{number}", "1")
        finished, broken = self._store.add("finished", len(indices)), self._store.add("broken", broken)
        return Count(self._store.add("begun", 0), finished, broken)

    def close(self, merge: Callable[[], None]) -> None:
        """Merge, or wait for who does."""
        while not self._store.check(["merged"]):
            if all(self._is_dead(rank) for rank in range(self.rank)):
                merge()
                self._store.set("merged", "1")
            time.sleep(_POLL)
        self._stop.set()
        self._store.set(f"left/{self.rank}", "1")
        # The process that may hold the store goes last.
        while self.rank == 0 and not all(
            self._store.check([f"left/{rank}"]) or self._is_dead(rank) for rank in range(1, self.world)
        ):
            time.sleep(_POLL)

    def leave(self) -> None:
        """Give no more signs of life."""
        self._stop.set()

    def _wait_until_told(self) -> None:
        """Stay until the others know: the store may go with this process."""
        deadline = time.monotonic() + SILENT
        others = [f"told/{rank}" for rank in range(1, self.world)]
        while not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def _taken(self, number: int, indices: list[int]) -> list[int]:
        self._left[number] = set(indices)
        self._chunk_of.update((index, number) for index in indices)
        return indices

    def _inherits(self, number: int) -> bool:
        """Whether a chunk's owner is dead, and this process is the first to take its place."""
        owner = int(self._store.get(f"owner/{number}")) if self._store.check([f"owner/{number}"]) else -1
        if owner == self.rank or not self._is_dead(owner):
            return False
        if self._store.add(f"heirs/{number}/{owner}", 1) != 1:
            return False
        self._store.set(f"owner/{number}", str(self.rank))
        return True

    def _is_dead(self, rank: int) -> bool:
        """Whether nothing was heard of a process for a while; -1 died before it said that a chunk is its own."""
        beat = self._store.add(f"beat/{rank}", 0)
        now = time.monotonic()
        last, since = self._heard.get(rank, (-1, now))
        if beat != last:
            self._heard[rank] = (beat, now)
            return False
        return now - since > SILENT

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except RuntimeError:  # the store is gone with the process that held it
                return


_calls = itertools.count()


@functools.cache
def _met() -> tuple[Any, int, int]:
    """The store of ``torchrun``, the rank of this process, and how many there are; it connects once."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    return store, rank, world


def sharing() -> Sharing:
    """This process alone, or with the others that ``torchrun`` has started; all of them make the same calls."""
    if dist.is_available() and dist.is_initialized():
        store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ and dist.is_available():
        store, rank, world = _met()
    else:
        return Sharing()
    if world == 1:
        return Sharing()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Together(dist.distributed_c10d.PrefixStore(f"fastadv_adapters/{attempt}/{next(_calls)}", store), rank, world)
