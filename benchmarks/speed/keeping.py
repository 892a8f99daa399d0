"""What a forward pass keeps for the backward pass, and what keeping less costs, measured in turn.

Run with `python -m benchmarks.speed.keeping`; `--help` lists its options. For a residual
network with ReLU and for inverted residual blocks with SiLU and with LeakyReLU it measures each of the
package's ways to keep less alone, and adds what it does not do: a ReLU that keeps one byte per entry.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared.networks import resnet18, settle_statistics
from benchmarks.shared.report import OUT, Part, Report, Table, milliseconds, timing_record
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import Timing, measure_in_turn
from fastadv_adapters.comparison.memory import BytesKept, bytes_kept
from fastadv_adapters.folding import build as folding
from fastadv_adapters.kernels import routing

PLAIN, ATEN, OURS = "plain model", "fast, as PyTorch keeps it", "fast"
IN_PLACE, SHAPES = "fast, with activations in place alone", "fast, with convolutions that keep shapes alone"
MASK = "fast, and ReLU keeps a mask"

LEGEND = (
    "One forward and backward pass. PyTorch's: the fast network with layers that keep what PyTorch's own keep, the "
    "second row; times and gradients are compared with that. In place, shapes alone: see [what is kept for the "
    "backward pass](../how-it-works.md#what-is-kept-for-the-backward-pass)."
)
console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    width: int
    batch: int
    repeats: int
    warmup: int
    dtype: str


class InvertedBlock(nn.Module):
    """Inverted residual block: 1x1 convolution to four times the channels, depthwise 3x3, 1x1 back.

    Args:
        inputs: channels that come in.
        outputs: channels that leave.
        stride: of the depthwise convolution.
        activation: makes the activation behind the first two.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        inner = 4 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            activation(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            activation(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.body(x)
        return x + y if self.same else y


def inverted(activation: Callable[[], nn.Module], *, width: int, classes: int = 10) -> nn.Sequential:
    """Six inverted residual blocks (https://arxiv.org/abs/1801.04381) for 3x32x32 images."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation())
    sizes = [(1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1)]
    blocks = [InvertedBlock(i * width, o * width, stride, activation) for i, o, stride in sizes]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class _MaskReLU(torch.autograd.Function):
    """ReLU that keeps which entries are positive, a byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        product: Tensor = grad * positive
        return product


def _mask_relu(x: Tensor, inplace: bool = False) -> Tensor:
    masked: Tensor = _MaskReLU.apply(x)  # type: ignore[no-untyped-call]
    return masked


@contextmanager
def way_of_keeping(name: str) -> Iterator[None]:
    """Build, run and measure fast models inside as this way says."""
    with ExitStack() as stack:
        if name in (ATEN, IN_PLACE):
            stack.enter_context(mock.patch.object(folding, "keep_shape_only", return_value=None))
            stack.enter_context(mock.patch.object(routing, "DEPTHWISE", {}))
        if name in (ATEN, SHAPES):
            stack.enter_context(mock.patch.object(folding, "run_in_place", return_value=[]))
        if name == MASK:
            stack.enter_context(mock.patch.object(F, "relu", _mask_relu))
        yield


def step(name: str, network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """One forward and backward pass in one way."""

    def run() -> Tensor:
        leaf = x.clone().requires_grad_()
        with way_of_keeping(name):
            return torch.autograd.grad(F.cross_entropy(network(leaf), y), leaf)[0]

    return run


def ratio(timing: Timing, floor: Timing) -> str:
    """Time relative to another way's in the same round, so that a slow phase of the machine counts for both."""
    each = Timing(tuple(one / other for one, other in zip(timing.seconds, floor.seconds, strict=True)))
    return f"{each.median:.2f} ({each.quartiles[0]:.2f} to {each.quartiles[1]:.2f})"


def measure(title: str, model: nn.Module, names: list[str], settings: Settings, device: torch.device) -> Part:
    """Bytes kept and time of a step, for each way, on one network."""
    x = torch.rand(settings.batch, 3, 32, 32, device=device)
    y = torch.randint(10, (settings.batch,), device=device)
    model = settle_statistics(model.to(device), x)
    runs: dict[str, Callable[[], Tensor]] = {}
    kept: dict[str, BytesKept] = {}
    for name in names:
        with way_of_keeping(name):
            network = model if name == PLAIN else FastAttackModel(model, dtype=getattr(torch, settings.dtype))
            kept[name] = bytes_kept(network, x)
        runs[name] = step(name, network, x, y)
    same = {name: bool(torch.equal(run(), runs[ATEN]())) for name, run in runs.items()}
    timings = measure_in_turn(runs, device=device, repeats=settings.repeats, warmup=settings.warmup)
    own = kept[PLAIN].total
    rows = [
        (
            name,
            f"{kept[name].total / 1e3:.4g}",
            f"{kept[name].total / own:.2f}x",
            ", ".join(f"{layer} {part / kept[name].total:.0%}" for layer, part in kept[name].by_layer.items()),
            milliseconds(timings[name]),
            ratio(timings[name], timings[ATEN]),
            "yes" if same[name] else "no",
        )
        for name in names
    ]
    heads = ("kB per image", "to plain", "kept by", "ms, median (quartiles)", "time to PyTorch's", "same gradient")
    record = {
        name: {"bytes": kept[name].total, "by_layer": kept[name].by_layer, "same": same[name]}
        | timing_record(timings[name])
        for name in names
    }
    return Part([Table(f"{title}, batch {settings.batch}", ("way", *heads), rows, legend=LEGEND)], record)


def main(
    width: Annotated[
        int, typer.Option(help="Channels of the ResNet-18's first stage; the blocks have a quarter.")
    ] = 64,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 31,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    dtype: Annotated[str, typer.Option(help="What the fast network runs in: float32, bfloat16, float16.")] = "float32",
    threads: Annotated[int, typer.Option(help="Processor threads; 0 leaves PyTorch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Measure what is kept for the backward pass, and what keeping less costs; write JSON and Markdown."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = Settings(width, batch, repeats, warmup, dtype)
    place = torch.device(device)
    command = f"python -m benchmarks.speed.keeping --dtype {dtype}" + (f" --threads {threads}" if threads else "")
    name, title = f"keeping-{dtype}", f"What is kept for the backward pass, {dtype}"
    report = Report(name, title, command, asdict(settings), place, out, console)
    inner = max(width // 4, 1)
    ways = [PLAIN, ATEN, IN_PLACE, SHAPES, OURS]
    subjects: dict[str, tuple[nn.Module, list[str]]] = {
        "ResNet-18, ReLU": (resnet18(width=width), [*ways, MASK]),
        "Inverted blocks, SiLU": (inverted(nn.SiLU, width=inner), [PLAIN, ATEN, OURS]),
        "Inverted blocks, LeakyReLU": (inverted(lambda: nn.LeakyReLU(0.1), width=inner), ways),
    }
    for subject, (model, names) in subjects.items():
        with console.status(subject):
            report.add(subject, measure(subject, model, names, settings, place))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
