"""How right half precision is: gradients that vanish, their direction, and the robust accuracy that comes of them.

Run with `python -m benchmarks.precision`, or `python -m benchmarks.precision --help` for its options. Two networks
trained on handwritten digits until they are confident are attacked in several ways, once with their logits doubled;
every judgement is the plain float32 network's.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.correctness import Subject, confident_digits, judge
from benchmarks.networks import resnet18
from benchmarks.report import OUT, Part, Report
from benchmarks.rows import FIXED_SCALE, Prepared, Row, Setup, ours, recipe, torchattacks_pgd
from digits import Digits, rgb_digits, train

console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; see the options of the command."""

    images: int
    steps: int
    epochs: int
    resnet_images: int
    resnet_epochs: int
    resnet_width: int
    seed: int


class Multiplied(nn.Module):
    """A network whose logits are multiplied by a number, as further training would make them grow."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits * self.factor


def ways() -> tuple[Row, ...]:
    """The ways that are compared."""
    half = torch.float16
    builds: dict[str, Callable[[nn.Module, Setup], Prepared]] = {
        "plain float32": torchattacks_pgd,
        "fast float16": partial(ours, dtype=half),
        "fast bfloat16": partial(ours, dtype=torch.bfloat16),
        "fast float16, float64 logits": partial(ours, dtype=half, logits_dtype=torch.float64),
        "recipe float16": partial(recipe, dtype=half),
        "recipe float16, loss scale 2^16": partial(recipe, dtype=half, loss_scale=FIXED_SCALE),
    }
    return tuple(Row(label, label, half, build) for label, build in builds.items())


def train_subjects(settings: Settings, device: torch.device) -> Iterator[Subject]:
    """The networks, trained without attacks, so that they are confident."""
    small = confident_digits(device, images=settings.images, epochs=settings.epochs, seed=settings.seed)
    big = resnet18(width=settings.resnet_width).to(device)
    yield small
    if settings.resnet_images:
        data = Digits(*(part.to(device) for part in rgb_digits()))
        epochs, seed = settings.resnet_epochs, settings.seed
        train(big, data.train_images, data.train_labels, epochs=epochs, seed=seed, show_progress=False)
        yield Subject("ResNet-18", big.eval(), data, 0.05, settings.resnet_images)


def main(
    images: Annotated[int, typer.Option(help="Test images for the digits network, at most 360.")] = 200,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of the digits network.")] = 20,
    resnet_images: Annotated[int, typer.Option(help="Test images for the ResNet-18; 0 leaves it out.")] = 100,
    resnet_epochs: Annotated[int, typer.Option(help="Epochs of the ResNet-18.")] = 12,
    resnet_width: Annotated[int, typer.Option(help="Channels of its first stage.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights, batches and attacks.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Compare gradients and robust accuracy of half-precision attacks with the plain network's."""
    settings = Settings(images, steps, epochs, resnet_images, resnet_epochs, resnet_width, seed)
    place = torch.device(device)
    title, command = "Right gradients in half precision", "python -m benchmarks.precision"
    report = Report("precision", title, command, asdict(settings), place, out, console)
    for subject in train_subjects(settings, place):
        for factor in (1, 2):
            name = f"{subject.name}, logits x {factor}"
            model = subject.model if factor == 1 else Multiplied(subject.model, factor).eval()
            with console.status(name):
                judgement = judge(ways(), subject, steps=steps, seed=seed, model=model)
            report.add(name, Part([judgement.table(name)], judgement.record()))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
