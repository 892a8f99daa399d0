"""3 x 3 convolutions in float32 on a processor: PyTorch's own and Winograd's algorithm, time and rounding.

Run with `python -m benchmarks.speed.convolutions`; `--help` lists its options. The layers
are those of a ResNet-18 and of a WRN-28-10 on images of 32 x 32. Both ways compute output and gradient at the input, in
turn; what is exact is computed in float64.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared.report import OUT, Part, Report, Table, milliseconds, timing_record
from fastadv_adapters.comparison import measure_in_turn
from fastadv_adapters.kernels import winograd

LAYERS = (
    *((64, 64, 32, 1), (128, 128, 16, 1), (256, 256, 8, 1), (512, 512, 4, 1), (128, 256, 16, 2), (256, 512, 8, 2)),
    *((160, 160, 32, 1), (320, 320, 16, 1), (640, 640, 8, 1), (160, 320, 32, 2), (320, 640, 16, 2)),
)
"""Channels in and out, rows and columns, and stride, of those of a ResNet-18 and of a WRN-28-10."""

console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    batch: int
    repeats: int
    widest: int
    seed: int


@dataclass(frozen=True)
class Layer:
    """A layer with an input and a gradient at its output.

    Attributes:
        conv: the layer.
        x: input behind a ReLU.
        grad: at the output.
    """

    conv: nn.Conv2d
    x: Tensor
    grad: Tensor

    def own(self) -> tuple[Tensor, Tensor]:
        """Output and gradient, as PyTorch computes them."""
        return self.conv(self.x), self._backward(self.conv, self.x, self.grad)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The same in float64."""
        double = copy.deepcopy(self.conv).double()
        return double(self.x.double()), self._backward(double, self.x.double(), self.grad.double())

    def winograd(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """Computes the same with weights that have been transformed."""
        weight, shape = self.conv.weight, self.x.shape
        made = winograd.transform(self.conv, shape, weight)
        return lambda: (made.convolve(self.x), made.gradient(self.grad, shape, weight))

    @staticmethod
    def _backward(conv: nn.Conv2d, x: Tensor, grad: Tensor) -> Tensor:
        wanted = (True, False, False)
        arguments = conv.stride, conv.padding, conv.dilation, False, (0, 0), 1, wanted
        gradient: Tensor = torch.ops.aten.convolution_backward(grad, x, conv.weight, None, *arguments)[0]
        return gradient


def make(inputs: int, outputs: int, size: int, stride: int, batch: int) -> Layer:
    """A layer and a batch, channels-last."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1).requires_grad_(False)
    x = torch.randn(batch, inputs, size, size).relu().contiguous(memory_format=torch.channels_last)
    return Layer(conv, x, torch.randn_like(conv(x)))


def measure(layer: Layer, name: str, repeats: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One layer: a row of the table, and all numbers."""
    ways = {"own": layer.own, "winograd": layer.winograd()}
    exact = layer.exact()
    errors = {key: [_error(*pair) for pair in zip(way(), exact, strict=True)] for key, way in ways.items()}
    timings = measure_in_turn(ways, device=torch.device("cpu"), repeats=repeats, warmup=2)
    times = timings["own"].median / timings["winograd"].median
    used = winograd.pays(layer.conv, layer.x.shape)
    (own, own_gradient), (ours, our_gradient) = errors["own"], errors["winograd"]
    row = (
        name,
        *(milliseconds(timings[key]) for key in ways),
        f"{times:.2f}x",
        f"{ours / own:.2f}, {our_gradient / own_gradient:.2f}",
        "yes" if used else "no",
    )
    record = {key: {**timing_record(timings[key]), "errors": errors[key]} for key in ways}
    return row, {**record, "times_faster": times, "used": used}


def _error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to the same of what is exact."""
    return float((found - exact).norm() / exact.norm())


def main(
    batch: Annotated[int, typer.Option(help="Images.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    widest: Annotated[int, typer.Option(help="Layers with more channels are left out.")] = 640,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Compare Winograd's algorithm with PyTorch's convolutions, layer by layer."""
    torch.manual_seed(seed)
    title, command = "Winograd's algorithm, layer by layer", "python -m benchmarks.speed.convolutions"
    settings = asdict(Settings(batch, repeats, widest, seed))
    report = Report("convolutions", title, command, settings, torch.device("cpu"), out, console)
    rows, record = [], {}
    with torch.no_grad():
        for inputs, outputs, size, stride in (layer for layer in LAYERS if layer[1] <= widest):
            name = f"{inputs} to {outputs} channels, {size}x{size}, stride {stride}"
            row, record[name] = measure(make(inputs, outputs, size, stride, batch), name, repeats)
            rows.append(row)
    columns = ("layer", "PyTorch's own, ms", "Winograd's, ms", "faster", "error, to PyTorch's", "used")
    note = (
        "Output and gradient together, float32. Error: of the output and of the gradient, root mean square against "
        "float64, Winograd's over PyTorch's. Used: whether the fast network takes it for this layer and batch."
    )
    report.add("layers", Part([Table("Layers", columns, rows, note)], record))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
