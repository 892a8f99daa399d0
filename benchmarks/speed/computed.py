"""Networks that compute weights in every pass: plain, fast as they are, and fast with what they compute kept.

Run with `python -m benchmarks.speed.computed`; `--help` lists its options. One gradient pass each, in turn.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

from benchmarks.shared.report import OUT, Part, Report, Table, milliseconds, timing_record
from benchmarks.shared.rows import half_of
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import measure_in_turn
from fastadv_adapters.folding import build

console = Console()


class Standardised(nn.Conv2d):
    """A convolution whose weights the batch norm operator standardises.

    By Qiao et al. 2019 (https://arxiv.org/abs/1903.10520); scaled as in NFNets, by Brock et al. 2021
    (https://arxiv.org/abs/2102.06171).
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, size // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        """Standardise, and convolve."""
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, self.gain * self.scale, None, training=True, momentum=0.0)
        return F.conv2d(input, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


class Bottleneck(nn.Module):
    """Without batch norm, with groups of 64 channels, as in an NFNet."""

    def __init__(self, conv: Callable[..., nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.shortcut = conv(inputs, outputs, 1, stride=stride)
        self.layers = nn.Sequential(
            nn.SiLU(),
            conv(inputs, inner, 1),
            nn.SiLU(),
            conv(inner, inner, 3, stride=stride, groups=inner // 64),
            nn.SiLU(),
            conv(inner, inner, 3, groups=inner // 64),
            nn.SiLU(),
            conv(inner, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add a fifth of the branch, as NFNets do."""
        out: Tensor = self.shortcut(x) + 0.2 * self.layers(x)
        return out


def network(conv: Callable[..., nn.Module], blocks: int) -> nn.Module:
    """Four stages for images in colour."""
    widths, layers = (64, 256, 512, 1536, 1536), [conv(3, 64, 3, stride=2)]
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(Bottleneck(conv, inputs, outputs, 2))
        layers += [Bottleneck(conv, outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))


def _normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[..., nn.Module]:
    def conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
        return norm(nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups))

    return conv


KINDS: dict[str, Callable[..., nn.Module]] = {
    "standardised weights": Standardised,
    "weight norm": _normed(parametrizations.weight_norm),
    "spectral norm, by hook": _normed(spectral_norm),
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    batch: int
    size: int
    blocks: int
    repeats: int
    seed: int


def measure(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """The times of one gradient pass of each way."""
    x, dtype = torch.rand(settings.batch, 3, settings.size, settings.size), half_of(torch.device("cpu"))
    with mock.patch.object(build, "remember", return_value=None):
        without = FastAttackModel(model, dtype=dtype or torch.float32)
        _pass(without, x)
    ours = FastAttackModel(model, dtype=dtype or torch.float32)
    ways = {"plain": model, "fast without a memo": without, "fast": ours}
    runs = {name: (lambda way=way: _pass(way, x)) for name, way in ways.items()}
    timings = measure_in_turn(runs, device=torch.device("cpu"), repeats=settings.repeats, warmup=2)
    return {name: timing_record(timing) | {"told": milliseconds(timing)} for name, timing in timings.items()}


def _pass(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(len(x))), x)
    return gradient


def main(
    batch: Annotated[int, typer.Option(help="Images.")] = 8,
    size: Annotated[int, typer.Option(help="Rows and columns of an image.")] = 96,
    blocks: Annotated[int, typer.Option(help="In each of the four stages.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 9,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Time gradient passes of networks whose weights are computed from others."""
    settings = Settings(batch, size, blocks, repeats, seed)
    title, command = "What modules compute from weights alone", "python -m benchmarks.speed.computed"
    report = Report("computed", title, command, asdict(settings), torch.device("cpu"), out, console)
    rows, record = [], {}
    for name, conv in KINDS.items():
        torch.manual_seed(seed)
        found = record[name] = measure(network(conv, blocks).eval(), settings)
        times = found["fast without a memo"]["median_s"] / found["fast"]["median_s"]
        rows.append((name, *(found[way]["told"] for way in found), f"{times:.2f}x"))
    columns = ("network", "plain, ms", "fast without a memo, ms", "fast, ms", "by the memo")
    note = "One forward and backward pass of a network like an NFNet, in the fastest dtype of the processor."
    report.add("networks", Part([Table("Gradient passes", columns, rows, note)], record))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
