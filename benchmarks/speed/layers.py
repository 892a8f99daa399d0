"""Kernels layer by layer: PyTorch's own in bfloat16 and float32, and what the fast network runs in their place.

Run with `python -m benchmarks.speed.layers`; `--help` lists its options. A layer that takes much longer in bfloat16
than in float32 has a slow kernel. Output and gradient at the input are computed together, all ways in turn.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared.heap import keep_freed_memory
from benchmarks.shared.report import OUT, Part, Report, Table, milliseconds, timing_record
from benchmarks.speed.layer_kinds import LAYERS, Layer
from fastadv_adapters.comparison import measure_in_turn
from fastadv_adapters.folding import build_fast, trace
from fastadv_adapters.modules import Precision

SLOW = 2.0
"""A layer that takes so many times as long in bfloat16 as in float32 has a slow kernel."""

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

console = Console(width=None if sys.stdout.isatty() else 180)


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    layers: str
    repeats: int
    seed: int
    keep_freed: bool


def own(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """PyTorch's layer in this dtype, channels-last."""
    converted = copy.deepcopy(layer).to(dtype)
    for part in converted.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = dense(parameter.data)
    return converted


def ours(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What the fast network makes of it."""
    precision = Precision(CPU, dtype, channels_last=True)
    around = nn.Sequential(layer)  # a layer that is a whole model may be read by its caller
    network = build_fast(around, trace(around), precision).network

    def run(x: Tensor) -> Tensor:
        with precision.context():
            output: Tensor = network(x)
            return output

    return run


def dense(tensor: Tensor) -> Tensor:
    """The tensor channels-last, if it is an image or a volume."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.ndim, torch.contiguous_format))


def ways_of(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Each way to compute output and gradient at the input."""

    def step(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            leaf = x.detach().requires_grad_()
            output = run(leaf)
            return output.detach(), torch.autograd.grad(output, leaf, grad.to(output.dtype))[0]

        return call

    ways = {}
    for name, dtype in DTYPES.items():
        inputs = x.to(dtype), grad.to(dtype)
        ways[f"own {name}"] = step(own(layer, dtype), *inputs)
        ways[f"ours {name}"] = step(ours(layer, dtype), *inputs)
    ways["exact"] = step(own(layer, torch.float64), x.double(), grad.double())
    return ways


def measure(kind: Layer, name: str, repeats: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One layer: a row of the table, and all numbers."""
    layer = kind.make().eval().requires_grad_(False)
    x = torch.randn(kind.batch, *kind.shape).bfloat16().float()
    x = x if "attention" in name else dense(x)
    grad = torch.randn_like(layer(x)).bfloat16().float()
    ways = ways_of(layer, x, grad)
    exact = ways.pop("exact")()
    errors = {key: [_error(*pair) for pair in zip(way(), exact, strict=True)] for key, way in ways.items()}
    timings = measure_in_turn(ways, device=CPU, repeats=repeats, warmup=1)
    median = {key: timing.median for key, timing in timings.items()}
    slower = median["own bfloat16"] / median["own float32"]
    faster = {key: median[f"own {key}"] / median[f"ours {key}"] for key in DTYPES}
    left = median["ours bfloat16"] / min(median["own float32"], median["ours float32"])
    row = (
        name,
        sizes(kind),
        *(milliseconds(timings[key]) for key in ways),
        f"{slower:.2f}{' (slow)' if slower >= SLOW else ''}",
        *(f"{faster[key]:.2f}x" for key in DTYPES),
        f"{left:.2f}{' (slow)' if left >= SLOW else ''}",
    )
    record = {key: {**timing_record(timings[key]), "errors": errors[key]} for key in ways}
    return row, {**record, "own_to_float32": slower, "faster": faster, "ours_to_float32": left}


def sizes(kind: Layer) -> str:
    """The shape of its input, with the batch."""
    return "x".join(map(str, (kind.batch, *kind.shape)))


def _error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to the same of what is exact."""
    return float((found - exact).norm() / exact.norm())


def main(
    only: Annotated[str, typer.Option(help="Layers whose names contain this text; all if it is empty.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 9,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    keep_freed: Annotated[bool, typer.Option(help="Let malloc keep freed memory: page faults fall by chance.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Measure kernels in bfloat16 and float32 on a processor, PyTorch's own and ours, layer by layer."""
    torch.manual_seed(seed)
    chosen = {name: kind for name, kind in LAYERS.items() if only in name}
    if not chosen:
        raise typer.BadParameter(f"expected a part of one of {', '.join(LAYERS)}, got {only!r}: name another")
    settings = Settings(only or "all", repeats, seed, keep_freed and keep_freed_memory())
    title, command = "Kernels in bfloat16, layer by layer", "python -m benchmarks.speed.layers"
    report = Report("layers", title, command, asdict(settings), CPU, out, console)
    rows, record = [], {}
    for name, kind in chosen.items():
        row, record[name] = measure(kind, name, repeats)
        rows.append(row)
    ways = [f"{whose} {name}, ms" for name in DTYPES for whose in ("own", "ours")]
    columns = (
        "layer",
        "input",
        *ways,
        "own bfloat16 to float32",
        "faster, bfloat16",
        "faster, float32",
        "ours to float32",
    )
    note = (
        "Output and gradient at the input together, channels-last. Own: PyTorch's layer. Ours: the same layer as "
        f"the fast network runs it. Slow: {SLOW:g} times the time of float32 or more. Own bfloat16 to float32: "
        "PyTorch's time in bfloat16 over that in float32. Ours to float32: our bfloat16 over the faster one of both "
        "ways in float32. A call of ours costs some 20 microseconds more, which shows in the smallest layers. Channels "
        "and options of each layer are in `benchmarks/speed/layer_kinds.py`."
    )
    report.add("layers", Part([Table("Layers", columns, rows, note)], record))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
