"""What `compare` recommends, measured again: is it ever slower than the plain model by more than 5 %?

Run with `python -m benchmarks.speed.recommended`, on the models of `benchmarks.speed.people`.
"""

import importlib.metadata
import importlib.util
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared.heap import keep_freed_memory
from benchmarks.shared.report import OUT, Part, Report, Table
from benchmarks.speed.people import MODELS, gradient
from fastadv_adapters import Comparison, FastAttackModel, compare
from fastadv_adapters.comparison import measure_in_turn

console = Console()
ALLOWED = 1.05
"""The most by which what is recommended may be slower than plain."""


def measure(model: nn.Module, x: Tensor, y: Tensor, *, repeats: int) -> dict[str, Any]:
    """What is recommended, and the ratio of a new measurement of gradient passes; 1 for the plain model itself."""
    found = compare(model, x, y, repeats=repeats, progress=False)
    return {
        "verdict": found.verdict,
        "recommended": found.recommended_row,
        "ratios": {row.name: row.ratio for row in found.rows if row.failure is None},
        "again": 1.0 if found.recommended is None else _again(model, x, y, found, repeats),
        "faithful": found.faithful,
    }


def _again(model: nn.Module, x: Tensor, y: Tensor, found: Comparison, repeats: int) -> float:
    fast = FastAttackModel(model, **(found.recommended or {}))
    ways = {"plain": partial(gradient, model, x, y), "fast": partial(gradient, fast, x, y)}
    timings = measure_in_turn(ways, device=x.device, repeats=4 * repeats + 1, warmup=3)
    return timings["plain"].median / timings["fast"].median


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """A line per model."""
    body = [
        [
            name,
            row["recommended"] or "plain",
            ", ".join(f"{way} {ratio:.2f}" for way, ratio in row["ratios"].items() if way != "plain"),
            "yes" if row["faithful"] else "no",
            f"{row['again']:.2f}",
            "yes" if row["again"] * ALLOWED >= 1 else "NO",
        ]
        for name, row in rows.items()
    ]
    columns = ["model", "recommended", "PGD-10, plain over fast", "default faithful", "measured again", "holds"]
    note = (
        "Models untrained, each on one batch. The dtype that default options choose has no entry of its own. Measured "
        "again: time of a gradient pass of the plain model over that of what is recommended. Holds: it is not slower "
        f"than plain by more than {ALLOWED - 1:.0%}. Recommended, faithful: [as compare "
        "says](../guides/compare.md#what-it-finds)."
    )
    return Table("PGD-10 in every way, and what is recommended", columns, body, note)


def main(
    repeats: Annotated[int, typer.Option(help="Timed rounds of compare.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads; 0 for PyTorch's own choice.")] = 0,
    only: Annotated[str, typer.Option(help="A part of the names of the models to run.")] = "",
    keep_freed: Annotated[bool, typer.Option(help="Keep freed memory in the process (glibc).")] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Compare every model, and measure what is recommended again; status 1 if it does not hold for one."""
    if threads:
        torch.set_num_threads(threads)
    kept = keep_freed_memory() if keep_freed else False
    there = importlib.util.find_spec("timm") is not None
    version = importlib.metadata.version("timm") if there else "not there"
    settings = {"repeats": repeats, "threads": torch.get_num_threads(), "freed memory kept": kept, "timm": version}
    command = "python -m benchmarks.speed.recommended"
    report = Report("recommended", "What compare recommends", command, settings, torch.device("cpu"), out, console)
    rows: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        if only in model.name and (there or not model.timm):
            with console.status(model.name):
                rows[f"{model.name}, batch {model.batch}"] = measure(*model.make(), repeats=repeats)
            report.add("recommended", Part([table_of(rows)], rows), show=False)
    report.finish()
    table_of(rows).show(console)
    if any(row["again"] * ALLOWED < 1 for row in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
