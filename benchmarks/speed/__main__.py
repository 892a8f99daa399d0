"""Every way to run the same attack on the same hardware, measured in one process and in turn.

Run with `make bench`, on a GPU with `make bench-gpu`, or `python -m benchmarks.speed --help` for the options.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console

from benchmarks.shared.heap import keep_freed_memory
from benchmarks.shared.report import OUT, Report
from benchmarks.shared.rows import choose, every_row
from benchmarks.speed.cases import SCALES, Size, cases
from benchmarks.speed.parts import PARTS, Bench, Settings

EXPLAINED = "[How to read the tables](../performance.md#how-to-read-the-tables)."
console = Console(width=None if sys.stdout.isatty() else 180)  # a log is read later, and elsewhere


def pick(names: Sequence[str], wanted: str, what: str) -> list[str]:
    """The names that are asked for, with commas between, in the order asked for; "all" for all.

    Raises:
        typer.BadParameter: one that there is not.
    """
    given = dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip())
    asked = list(names if wanted == "all" else given)
    unknown = [name for name in asked if name not in names]
    if unknown or not asked:
        raise typer.BadParameter(f'expected {what} to be "all" or some of {", ".join(names)}, got {wanted!r}')
    return asked


@contextmanager
def cold_compiler() -> Iterator[None]:
    """Compile with an empty cache: what it costs is to be measured, whatever has been compiled in an earlier run."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def draw_results(report: Report) -> None:
    """Draw the picture, or say why there is none."""
    networks = {key: record for key, record in report.results.get("networks", {}).items() if record["rows"]}
    if not networks:
        return
    from benchmarks.speed.plot import draw

    try:
        draw(networks, report.results.get("correctness", {}), report.path("png"), title=report.title)
    except ImportError as error:
        report.console.print(f"no picture is drawn: {error}")
        return
    report.picture = report.path("png")
    report.write()


def main(
    size: Annotated[str, typer.Option(help="Of the networks: full for a GPU, small for two cores, tiny.")] = "small",
    networks: Annotated[str, typer.Option(help="Which, with commas between.")] = "all",
    rows: Annotated[str, typer.Option(help='Ways: "all", "core", "lean", or keys with commas between.')] = "all",
    parts: Annotated[str, typer.Option(help="What to measure, with commas between, in this order.")] = "all",
    sweep: Annotated[bool, typer.Option("--sweep", help="Try batch sizes too, in as much time again.")] = False,
    width: Annotated[int, typer.Option(help="Channels of the ResNet-18's first stage; 0: as the size says.")] = 0,
    batch: Annotated[int, typer.Option(help="Images per attack on the ResNet-18; 0: as the size says.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    repeats: Annotated[int, typer.Option(help="Timed rounds, at most.")] = 5,
    minutes: Annotated[float, typer.Option(help="For all of it, rounds are cut for it; 0: as the size says.")] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 leaves PyTorch's choice.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, images and random starts.")] = 0,
    keep_freed: Annotated[bool, typer.Option(help="Let malloc keep freed memory: page faults fall by chance.")] = True,
    apart: Annotated[
        bool | None, typer.Option("--apart/--in-turn", help="One way after the other, kept at once; usual on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and the picture.")] = OUT,
) -> None:
    """Measure PGD in every way, and whether each way is right; write JSON, Markdown and a picture."""
    if threads:
        torch.set_num_threads(threads)
    scale = cast(Size, pick(list(SCALES), size, "size")[0])
    place, known = torch.device(device), {case.key: case for case in cases(scale, width=width, batch=batch)}
    chosen = [known[key] for key in pick(list(known), networks, "networks")]
    wanted = pick(PARTS, parts, "parts") + ["sweep"] * sweep
    try:
        choose(every_row(place), rows)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    keeps = keep_freed and keep_freed_memory()
    alone = place.type == "cuda" if apart is None else apart
    time = minutes or SCALES[scale].minutes
    settings = Settings(scale, networks, rows, parts, steps, repeats, time, seed, keeps, alone)
    name, hardware = ("bench-gpu", "a GPU") if place.type == "cuda" else ("bench", "a processor")
    title, command = f"Attacks on {hardware}: every way, in turn", f"make {name}"
    report = Report(name, title, command, asdict(settings), place, out, console, first="limits", explained=EXPLAINED)
    with cold_compiler():
        Bench(settings, chosen, report).run(wanted)
    draw_results(report)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
