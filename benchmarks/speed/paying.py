"""From how much work on does half precision pay? The figures behind `fastadv_adapters/networks/paying.py`.

Run with `python -m benchmarks.speed.paying`: networks of many sizes, a gradient pass each in bfloat16 and in
float32, in turn, with the work that the rule sees beside them.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.shared.heap import keep_freed_memory
from benchmarks.shared.networks import VisionTransformer
from benchmarks.shared.report import OUT, Part, Report, Table
from benchmarks.speed.people import Model, gradient, lenet, mlp
from digits import DigitsNet
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import measure_in_turn
from fastadv_adapters.networks.paying import LEAST, Work

console = Console()
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def models() -> Iterator[Model]:
    """Networks around the bounds of the rule, on both sides."""
    for width, batch in ((64, 16), (64, 64), (128, 32), (128, 64), (128, 128), (256, 32), (512, 8), (512, 32)):
        yield Model(f"MLP of width {width}", partial(mlp, 784, width, width, 10), (1, 28, 28), batch)
    for width, batch in ((4, 32), (8, 8), (8, 32), (16, 4), (16, 16), (16, 32), (32, 1), (32, 4), (32, 16)):
        yield Model(f"digits net of width {width}", partial(DigitsNet, width=width), (1, 8, 8), batch)
    for batch in (1, 4, 16):
        yield Model("LeNet", lenet, (1, 28, 28), batch)
    for width, batch in ((32, 4), (32, 16), (64, 2), (64, 8), (64, 32)):
        build = partial(VisionTransformer, image=32, patch=4, width=width, depth=2, heads=4)
        yield Model(f"ViT of width {width}", build, (3, 32, 32), batch)


def measure(model: Model, *, repeats: int) -> dict[str, Any]:
    """The work of a pass, what the rule makes of it, and medians in both precisions."""
    net, x, y = model.make()
    with torch.no_grad(), Work() as work:
        net(x)
    kind, mean = work.mean()
    ways = {name: FastAttackModel(net, dtype=dtype) for name, dtype in PRECISIONS.items()}
    timings = measure_in_turn(
        {name: partial(gradient, way, x, y) for name, way in ways.items()},
        device=torch.device("cpu"),
        repeats=repeats,
        warmup=3,
    )
    return {
        "kind": kind,
        "multiplications": mean,
        "chosen": "bfloat16" if mean >= LEAST[kind] else "float32",
        "milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()},
        "gain": timings["float32"].median / timings["bfloat16"].median,
    }


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """Work beside what half precision gains, from the least work up."""
    ordered = sorted(rows.items(), key=lambda item: (item[1]["kind"], item[1]["multiplications"]))
    body = [
        [name, row["kind"], f"{row['multiplications'] / 1e6:.2f}", f"{row['gain']:.2f}", row["chosen"]]
        for name, row in ordered
    ]
    bounds = ", ".join(f"{bound / 1e6:g} million in a {kind}" for kind, bound in LEAST.items())
    return Table(
        "Float32 over bfloat16",
        ["model", "most work in", "millions in one, mean", "float32 / bfloat16", "the rule takes"],
        body,
        f"A gradient pass in float32 over one in bfloat16; above 1 bfloat16 is faster. The rule's bounds: {bounds}.",
    )


def main(
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 201,
    threads: Annotated[int, typer.Option(help="Threads; 0 for PyTorch's own choice.")] = 1,
    only: Annotated[str, typer.Option(help="A part of the names of the models to run.")] = "",
    keep_freed: Annotated[bool, typer.Option(help="Keep freed memory in the process (glibc).")] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Time every model in both precisions."""
    if threads:
        torch.set_num_threads(threads)
    kept = keep_freed_memory() if keep_freed else False
    settings = {"repeats": repeats, "threads": torch.get_num_threads(), "freed memory kept": kept}
    command = "python -m benchmarks.speed.paying"
    report = Report("paying", "When half precision pays", command, settings, torch.device("cpu"), out, console)
    rows: dict[str, dict[str, Any]] = {}
    for model in models():
        if only in model.name:
            rows[f"{model.name}, batch {model.batch}"] = measure(model, repeats=repeats)
    report.add("paying", Part([table_of(rows)], rows), show=False)
    report.finish()
    table_of(rows).show(console)


if __name__ == "__main__":
    typer.run(main)
