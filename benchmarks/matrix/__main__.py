"""`python -m benchmarks.matrix`: run what has not been run, and write the page of what has."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.matrix.cases import LOOKS
from benchmarks.matrix.cells import DTYPES, Cell, Outcome, read
from benchmarks.matrix.page import write_pages
from benchmarks.matrix.plan import ROWS, Plan
from benchmarks.matrix.results import Results
from benchmarks.matrix.running import Task, prepare, run_all

CACHE = Path("build/matrix")
console = Console()


def main(
    attacks: Annotated[str, typer.Option(help="Attacks to run, with commas between; all if none is named.")] = "",
    images: Annotated[int, typer.Option(help="Images in float32; half precision takes a quarter.")] = 100,
    dtypes: Annotated[str, typer.Option(help="Of the fast model, with commas between; all if none is named.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin no cell after so long.")] = 60,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one per core.")] = 0,
    limit: Annotated[int, typer.Option(help="Seconds after which one attack is given up.")] = 300,
    run: Annotated[bool, typer.Option(help="--no-run only writes the page of what has been run.")] = True,
    again: Annotated[bool, typer.Option(help="--again runs what has been run, too.")] = False,
    cache: Annotated[Path, typer.Option(help="Folder for the networks and for each cell's outcome.")] = CACHE,
    out: Annotated[Path, typer.Option(help="Folder for the pages.")] = Path("docs"),
) -> None:
    """Run every attack on plain and fast models; what is there from an earlier run is kept."""
    plan = Plan(images, _known(dtypes, DTYPES), _known(attacks, [row.attack for row in ROWS]))
    if run:
        with console.status("networks"):
            prepare(cache)
        until, count = time.monotonic() + 60 * minutes, workers or os.cpu_count() or 1
        _run([task for task in plan.cells() if again or _is_left(task, cache)], cache, count, limit, until)
        for _ in LOOKS:
            doubtful = {task[0]: task for task in Results(plan, cache).next_looks() if _is_left(task, cache)}
            _run(list(doubtful.values()), cache, count, limit, until)
    left_out = sum(_is_left(task, cache) for task in [*plan.cells(), *Results(plan, cache).next_looks()])
    for path in write_pages(images, cache, out):
        console.print(f"written: {path}")
    if left_out:
        console.print(f"{left_out} cells are left: run again to go on")


def _is_left(task: Task, cache: Path) -> bool:
    return read(task[0], task[2], cache) is None


def _known(names: str, known: Iterable[str]) -> tuple[str, ...]:
    """The names given, or all that are known; an error for one that is not."""
    choices = tuple(dict.fromkeys(known))
    given = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in given:
        if name not in choices:
            raise typer.BadParameter(f"expected one of {', '.join(choices)}, got {name}")
    return given or choices


def _run(tasks: list[Task], cache: Path, workers: int, limit: int, until: float) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("matrix", total=len(tasks))
        for cell, outcome in run_all(tasks, cache, workers=workers, limit=limit, until=until):
            progress.update(bar, advance=1, description=f"{cell.attack} {cell.label} {cell.way}")
            if outcome.error:
                progress.console.print(_told(cell, outcome), markup=False)


def _told(cell: Cell, outcome: Outcome) -> str:
    return f"{cell.library} {cell.attack} {cell.label} {cell.subject} {cell.way}: {outcome.error}"


if __name__ == "__main__":
    typer.run(main)
