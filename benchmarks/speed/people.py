"""The models that people have: is the fast one ever slower than the plain one?

Run with `python -m benchmarks.speed.people`. For each model gradient passes and passes without gradient, plain and
fast, in turns, in a process of its own, and how long a fast model takes until its first gradient is there. Those of
timm are left out if it is not installed (`pip install timm`).
"""

import importlib.metadata
import importlib.util
import itertools
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared.heap import keep_freed_memory
from benchmarks.shared.networks import VisionTransformer, settle_statistics
from benchmarks.shared.report import OUT, Part, Report, Table
from benchmarks.speed.people_limits import must_hold
from digits import DigitsNet
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import Timing, measure_in_turn

console = Console()
TURN = 0.05
"""Seconds that a turn takes at least: an attack makes its passes in a row, not by turns with the plain model."""
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
}


@dataclass(frozen=True)
class Model:
    """A model at one size.

    Attributes:
        name: in options and tables.
        build: makes it, with random weights.
        shape: of one image.
        batch: images in a pass.
        timm: whether it comes from timm.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    timm: bool = False

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The model in eval mode with settled statistics, images and labels."""
        torch.manual_seed(0)
        x = torch.rand(self.batch, *self.shape)
        model = settle_statistics(self.build(), x[:64])
        with torch.no_grad():
            return model, x, model(x).argmax(1)


def mlp(*widths: int) -> nn.Module:
    """Linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Module:
    """Two convolutions, two linear layers, no batch norm."""
    convolutions = nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def _timm(name: str, **options: Any) -> nn.Module:
    """A model of timm, which asks for torchvision but needs none of it to build one."""
    if not any(isinstance(finder, _NoTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoTorchvision())
    model: nn.Module = importlib.import_module("timm").create_model(name, **options)
    return model


class _NoTorchvision(MetaPathFinder, Loader):
    """Finds modules of torchvision that have every name, for the CPU build of that does not import everywhere."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.split(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Everything(type):
    """Of classes that have every name."""

    def __getattr__(cls, name: str) -> Any:
        return name


class _Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Everything(name, (), {})


def _of_timm(name: str, size: int, batch: int, **options: Any) -> Model:
    return Model(f"{name}, {size}", partial(_timm, name, **options), (3, size, size), batch, timm=True)


MODELS = (
    Model("MLP 784-128-10", partial(mlp, 784, 128, 10), (1, 28, 28), 16),
    Model("MLP 784-512-512-10", partial(mlp, 784, 512, 512, 10), (1, 28, 28), 128),
    Model("digits net, width 16", partial(DigitsNet, width=16), (1, 8, 8), 32),
    Model("digits net, width 32", partial(DigitsNet, width=32), (1, 8, 8), 32),
    Model("LeNet", lenet, (1, 28, 28), 32),
    Model(
        "ViT of 4 layers of width 64",
        partial(VisionTransformer, image=32, patch=4, width=64, depth=4, heads=4),
        (3, 32, 32),
        32,
    ),
    _of_timm("mobilenetv3_small_050", 96, 16),
    _of_timm("mobilenetv2_100", 96, 16),
    _of_timm("mnasnet_small", 96, 16),
    _of_timm("efficientnet_b0", 96, 16),
    _of_timm("convnext_atto", 96, 16),
    _of_timm("nfnet_l0", 96, 8),
    _of_timm("vit_tiny_patch16_224", 96, 16, img_size=96),
    _of_timm("vit_small_patch16_224", 224, 4),
    _of_timm("convnext_tiny", 224, 4),
)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of a pass."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]


def values(model: nn.Module, x: Tensor) -> Tensor:
    """A pass without gradient."""
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def start(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Seconds from a plain model to the first gradient of a fast one: construction, self-check and audit included."""
    began = time.perf_counter()
    gradient(FastAttackModel(model), x, y)
    return time.perf_counter() - began


def in_a_row(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Seconds of one pass of each way; a turn is of many passes if one is short."""
    for way in ways.values():
        way()
    began = time.perf_counter()
    ways["plain"]()
    passes = max(1, round(TURN / (time.perf_counter() - began)))
    turns = {name: partial(_repeat, way, passes) for name, way in ways.items()}
    timings = measure_in_turn(turns, device=torch.device("cpu"), repeats=repeats, warmup=1)
    return {name: Timing(tuple(s / passes for s in found.seconds)) for name, found in timings.items()}


def _repeat(way: Callable[[], object], times: int) -> None:
    for _ in range(times):
        way()


def measure(model: nn.Module, x: Tensor, y: Tensor, *, repeats: int) -> dict[str, Any]:
    """Medians of gradient passes of all ways, and of passes without gradient."""
    fast = {name: FastAttackModel(model, **options) for name, options in WAYS.items()}
    gradients = {"plain": model, **fast}
    passes = in_a_row({name: partial(gradient, net, x, y) for name, net in gradients.items()}, repeats)
    forwards = in_a_row(
        {name: partial(values, net, x) for name, net in (("plain", model), ("default", fast["default"]))}, repeats
    )
    seconds = min(start(model, x, y) for _ in range(2))  # what another process takes meanwhile is no cost of ours
    return {
        "start seconds": seconds,
        "start steps": seconds / passes["plain"].median,
        "runs in": str(fast["default"].dtype).removeprefix("torch."),
        "milliseconds": {name: 1e3 * timing.median for name, timing in passes.items()},
        "ratio": {name: _ratio(passes, name) for name in WAYS},
        "forward": _ratio(forwards, "default"),
        "forward milliseconds": {name: 1e3 * timing.median for name, timing in forwards.items()},
    }


def measure_at(place: int, repeats: int) -> dict[str, Any]:
    """The same for one of the models, in a process of its own: the memory that others leave makes a difference."""
    return measure(*MODELS[place].make(), repeats=repeats)


def _begin(threads: int, keep_freed: bool) -> None:
    if threads:
        torch.set_num_threads(threads)
    if keep_freed:
        keep_freed_memory()


def _ratio(timings: dict[str, Timing], name: str) -> float:
    return timings["plain"].median / timings[name].median


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """Ratios."""
    body = [
        [
            name,
            f"{row['milliseconds']['plain']:.2f} ms",
            f"{row['ratio']['default']:.2f} ({row['runs in']})",
            *(f"{row['ratio'][way]:.2f}" for way in ("bfloat16", "float32")),
            f"{row['forward']:.2f}",
            f"{row['milliseconds']['default'] - row['milliseconds']['plain']:+.2f} ms",
            f"{row['start seconds']:.2f} s ({row['start steps']:.0f} steps)",
        ]
        for name, row in rows.items()
    ]
    columns = ["model", "plain", "default options", "bfloat16", "float32", "without gradient", "default adds", "start"]
    note = (
        "Time of the plain model over that of the fast one, a gradient pass each; above 1 is faster. Medians of turns, "
        "models untrained. Default options: in brackets what they run in. bfloat16, float32: with that `dtype`. "
        "Without gradient: the same for passes without gradient, by default options. Default adds: the time of a "
        "gradient pass with default options less that of a plain one. Start: time until the first gradient of a new "
        "fast model; in brackets the same in gradient passes of the plain model. Each gradient pass of a fast model "
        "has a cost that does not depend on the batch (the boundary, and a look at every tensor and attribute for "
        "changes). A model whose pass takes no longer than that gains nothing, as the first row shows."
    )
    return Table("Plain time over fast time", columns, body, note)


def main(
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 21,
    threads: Annotated[int, typer.Option(help="Threads; 0 for PyTorch's own choice.")] = 0,
    only: Annotated[str, typer.Option(help="A part of the names of the models to run.")] = "",
    keep_freed: Annotated[bool, typer.Option(help="Keep freed memory in the process (glibc).")] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Time every model, plain and fast."""
    _begin(threads, keep_freed)
    kept = keep_freed and keep_freed_memory()
    begin = partial(_begin, threads, keep_freed)
    there = importlib.util.find_spec("timm") is not None
    version = importlib.metadata.version("timm") if there else "not there"
    settings = {"repeats": repeats, "threads": torch.get_num_threads(), "freed memory kept": kept, "timm": version}
    command = "python -m benchmarks.speed.people"
    report = Report("people", "Models that people have", command, settings, torch.device("cpu"), out, console)
    rows: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        if only in model.name and (there or not model.timm):
            with console.status(model.name), ProcessPoolExecutor(1, get_context("spawn"), begin) as process:
                row = process.submit(measure_at, MODELS.index(model), repeats).result()
                rows[f"{model.name}, batch {model.batch}"] = row
            report.add("people", Part([table_of(rows), must_hold(rows)], rows), show=False)
    report.finish()
    for table in (table_of(rows), must_hold(rows)):
        table.show(console)


if __name__ == "__main__":
    typer.run(main)
