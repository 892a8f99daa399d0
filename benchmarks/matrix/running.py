"""Run cells in as many processes as there are cores, and keep each outcome at once."""

import contextlib
import io
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from benchmarks.matrix.cases import Case, Row
from benchmarks.matrix.cells import Cell, Outcome, run, write
from benchmarks.matrix.subjects import RECIPES, Subject, subject

Task = tuple[Cell, Row, Case]
_subjects: dict[str, Subject] = {}


def prepare(cache: Path) -> None:
    """Train or load the networks, in this process; one thread, for the processes share the cores."""
    torch.set_num_threads(1)
    _subjects.update({name: subject(name, cache) for name in RECIPES})


def run_one(task: Task, cache: Path, limit: int) -> Outcome:
    """Run one cell in this process and keep its outcome; what libraries print is dropped."""
    cell, row, case = task
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        outcome = run(cell, row, case, _subjects[cell.subject], limit=limit)
    write(cell, outcome, cache)
    return outcome


def run_all(
    tasks: Sequence[Task], cache: Path, *, workers: int, limit: int, until: float
) -> Iterator[tuple[Cell, Outcome]]:
    """Run the cells, and hand over each as it is done; none is begun after the time `until` (of time.monotonic)."""
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    running: dict[Future[Outcome], Cell] = {}
    with ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(cache,)) as pool:
        while True:
            while len(running) < workers and time.monotonic() < until and (task := next(waiting, None)):
                running[pool.submit(run_one, task, cache, limit)] = task[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
