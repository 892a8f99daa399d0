"""How right half precision is: gradients that vanish, their direction, and the robust accuracy that comes of them.

Run with `python -m benchmarks.precision`, or `python -m benchmarks.precision --help` for its options. Two networks
trained on handwritten digits until they are confident are attacked in several ways; every judgement is the plain
float32 network's.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import torchattacks
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.networks import resnet18
from benchmarks.recipe import RecipeModel
from benchmarks.report import OUT, Table, deliver
from digits import Digits, DigitsNet, accuracy, grey_digits, rgb_digits, train
from fastadv_adapters import FastAttackModel

FIXED_SCALE = 2.0**16
"""What PyTorch's own gradient scaler starts with."""

console = Console()


@dataclass(frozen=True)
class Outcome:
    """What one way of attacking does on one network.

    Attributes:
        zero: share of the samples whose gradient is zero in every entry, 0 to 1.
        newly_zero: the same, of samples whose plain float32 gradient is not.
        cosine: mean over the samples of the cosine with the float64 gradient; a zero gradient has 0.
        robust: robust accuracy under torchattacks.PGD, 0 to 1.
    """

    zero: float
    newly_zero: float
    cosine: float
    robust: float


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


def mean_loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The input gradient of the mean cross entropy over the batch, which is torchattacks' loss."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]


def ways_of_attacking(*, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name to what prepares a network for the attack."""
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {"plain float32": lambda model: model}
    for dtype in dtypes:
        ways[f"fast {_short(dtype)}"] = lambda model, d=dtype: FastAttackModel(model, dtype=d)  # type: ignore[misc]
    ways["fast float16, float64 logits"] = lambda model: FastAttackModel(
        model, dtype=torch.float16, logits_dtype=torch.float64
    )
    ways["recipe float16"] = lambda model: RecipeModel(model, dtype=torch.float16)
    ways["recipe float16, loss scale 2^16"] = lambda model: RecipeModel(
        model, dtype=torch.float16, loss_scale=FIXED_SCALE
    )
    return ways


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judge(
    ways: Mapping[str, Callable[[nn.Module], nn.Module]],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    settings: Settings,
) -> dict[str, Outcome]:
    """Attack `model` in every way, from the same random start."""
    exact = mean_loss_gradient(copy.deepcopy(model).double(), x.double(), y).flatten(1)
    plain_zero = ~mean_loss_gradient(model, x, y).flatten(1).any(1)
    outcomes = {}
    for name, prepare in ways.items():
        prepared = prepare(model)
        gradient = mean_loss_gradient(prepared, x, y).double().flatten(1)
        zero = ~gradient.any(1)
        torch.manual_seed(settings.seed)
        attack = torchattacks.PGD(prepared, eps=eps, alpha=2.5 * eps / settings.steps, steps=settings.steps)
        outcomes[name] = Outcome(
            zero=zero.double().mean().item(),
            newly_zero=(zero & ~plain_zero).double().mean().item(),
            cosine=_cosine(gradient, exact).mean().item(),
            robust=accuracy(model, attack(x, y), y),
        )
    return outcomes


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of every row, free of underflow: gradients of confident networks go down to 1e-30."""
    rows = [row / row.abs().amax(1, keepdim=True).clamp(min=1e-300) for row in (left, right)]
    return torch.cosine_similarity(rows[0], rows[1], 1)


@dataclass(frozen=True)
class Subject:
    """A trained network, the data it was trained on, and how it is attacked: budget and number of images."""

    name: str
    model: nn.Module
    data: Digits
    eps: float
    images: int


def train_subjects(settings: Settings) -> Iterator[Subject]:
    """The networks, trained without attacks, so that they are confident."""
    small, big = DigitsNet(), resnet18(width=settings.resnet_width)
    for name, model, data, eps, images, epochs in (
        ("digits network", small, grey_digits(), 0.2, settings.images, settings.epochs),
        ("ResNet-18", big, rgb_digits(), 0.05, settings.resnet_images, settings.resnet_epochs),
    ):
        if images:
            train(model, data.train_images, data.train_labels, epochs=epochs, seed=settings.seed, show_progress=False)
            yield Subject(name, model.eval(), data, eps, images)


def verdict(found: Outcome, plain: Outcome) -> str:
    """Whether an attack in this way can be trusted as far as the plain one."""
    if found.newly_zero > 0 or found.robust > plain.robust + 0.01:
        return "wrong"
    return "stronger" if found.robust < plain.robust - 0.01 else "right"


def _rows(outcomes: Mapping[str, Outcome]) -> list[tuple[str, ...]]:
    plain = outcomes["plain float32"]
    return [
        (
            way,
            f"{found.zero:.1%}",
            f"{found.newly_zero:.1%}",
            f"{found.cosine:.4f}",
            f"{found.robust:.1%}",
            verdict(found, plain),
        )
        for way, found in outcomes.items()
    ]


def main(
    images: Annotated[int, typer.Option(help="Test images for the digits network, at most 360.")] = 200,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of the digits network.")] = 20,
    resnet_images: Annotated[int, typer.Option(help="Test images for the ResNet-18; 0 leaves it out.")] = 100,
    resnet_epochs: Annotated[int, typer.Option(help="Epochs of the ResNet-18.")] = 12,
    resnet_width: Annotated[int, typer.Option(help="Channels of its first stage.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights, batches and attacks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Compare gradients and robust accuracy of half-precision attacks with the plain network's."""
    settings = Settings(images, steps, epochs, resnet_images, resnet_epochs, resnet_width, seed)
    torch.manual_seed(seed)
    ways = ways_of_attacking(dtypes=(torch.float16, torch.bfloat16))
    tables, results = [], {}
    for subject in train_subjects(settings):
        x, y = (part[: subject.images] for part in (subject.data.test_images, subject.data.test_labels))
        for factor in (1, 2):
            title = f"{subject.name}, logits x {factor}"
            with console.status(title):
                model = subject.model if factor == 1 else Multiplied(subject.model, factor).eval()
                outcomes = judge(ways, model, x, y, eps=subject.eps, settings=settings)
            results[title] = {way: asdict(found) for way, found in outcomes.items()}
            tables.append(_table(title, outcomes, len(x), subject.eps, accuracy(model, x, y)))
    _deliver(tables, results, settings, out)


def _table(title: str, outcomes: Mapping[str, Outcome], count: int, eps: float, clean: float) -> Table:
    columns = ("way", "zero gradients", "not zero in plain", "cosine with float64", "robust accuracy", "verdict")
    return Table(
        title,
        columns,
        _rows(outcomes),
        f"{count} test images, torchattacks.PGD with eps {eps:g}, mean loss, clean accuracy {clean:.1%}. Robust "
        "accuracy is judged by the plain network. Wrong: a gradient is zero that is not in plain float32, or "
        "robust accuracy is overestimated by more than one image in a hundred.",
    )


def _deliver(tables: list[Table], results: dict[str, Any], settings: Settings, out: Path) -> None:
    deliver(
        "precision",
        title="Right gradients in half precision",
        tables=tables,
        results=results,
        settings=asdict(settings),
        device=torch.device("cpu"),
        out=out,
        console=console,
    )


if __name__ == "__main__":
    typer.run(main)
