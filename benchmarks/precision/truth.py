"""Attacks on models as people write them: is half precision, by default options, as strong as full precision?

Run with `python -m benchmarks.precision.truth`. Networks trained on handwritten digits are wrapped into models that end
in a sigmoid or a softmax, return their own loss, take a second input, or normalise a stream with a large mean. Each is
attacked by PGD with the loss that its users take, and every judgement is the plain network's.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.precision.written import (
    Auxiliary,
    Ends,
    Offset,
    OwnLoss,
    Pair,
    PreActivation,
    Prototypes,
    Segmenter,
    pixels,
)
from benchmarks.shared.report import OUT, Part, Report, Table
from digits import Digits, DigitsNet, grey_digits, train
from fastadv_adapters import FastAttackModel, FastAttackWarning

console = Console()

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model, images and labels: the loss of the attack, a number; or whether each prediction is right."""


@dataclass(frozen=True)
class Case:
    """One way to write a model.

    Attributes:
        name: what it is.
        model: in eval mode, on the CPU.
        eps: of the attack, in Linf.
        loss: what the attack climbs.
        right: which images (N,) the model gets right.
    """

    name: str
    model: nn.Module
    eps: float
    loss: Call
    right: Call


def cases(data: Digits, epochs: int) -> Iterator[Case]:
    """All of them; networks are trained on the way."""
    torch.manual_seed(0)
    net = DigitsNet(width=16)
    train(net, data.train_images, data.train_labels, epochs=epochs, show_progress=False)
    one = DigitsNet(width=16)
    one.head = nn.Linear(64, 1)
    _fit(one, data, epochs, lambda m, x, y: F.binary_cross_entropy_with_logits(m(x)[:, 0], (y > 4).float()))
    sigmoid = Ends(one, 1.0, nn.Sigmoid())
    yield Case(
        "ends in a sigmoid, binary",
        sigmoid,
        0.15,
        lambda m, x, y: F.binary_cross_entropy(m(x)[:, 0].float(), (y > 4).float()),
        lambda m, x, y: (m(x)[:, 0] > 0.5) == (y > 4),
    )
    by_logits: Call = lambda m, x, y: m(x)["logits"].argmax(1) == y  # noqa: E731
    for factor in (2, 3):
        yield Case(
            f"returns its own loss, logits x {factor}",
            OwnLoss(net, factor),
            0.1,
            lambda m, x, y: m(x, labels=y)["loss"],
            by_logits,
        )
    yield Case(
        "labels as second input, loss on the logits, logits x 2",
        OwnLoss(net, 2),
        0.1,
        lambda m, x, y: F.cross_entropy(m(x, labels=y)["logits"], y),
        by_logits,
    )
    text = torch.eye(10) * 4 - 0.4
    yield Case(
        "image and text, in the manner of CLIP",
        Pair(net),
        0.1,
        lambda m, x, y: F.cross_entropy(m(x, text), y),
        lambda m, x, y: m(x, text).argmax(1) == y,
    )
    yield from _behind_logits(net)
    yield from _by_large_numbers(net, data)
    yield from _by_batch_norm(data, epochs)
    yield _of_pixels(data, epochs)


def _classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y  # type: ignore[no-any-return]


def _behind_logits(net: nn.Module) -> Iterator[Case]:
    """Something follows the logits."""
    yield Case(
        "ends in a softmax, loss on probabilities",
        Ends(net, 1.0, nn.Softmax(1)),
        0.15,
        lambda m, x, y: F.nll_loss(m(x).clamp_min(1e-12).log(), y),
        _classes,
    )
    yield Case(
        "ends in a log-softmax", Ends(net, 2.0, nn.LogSoftmax(1)), 0.1, lambda m, x, y: F.nll_loss(m(x), y), _classes
    )
    yield Case(
        "ten sigmoids, logits x 4",
        Ends(net, 4.0, nn.Sigmoid()),
        0.1,
        lambda m, x, y: F.binary_cross_entropy(m(x).float(), F.one_hot(y, 10).float()),
        _classes,
    )
    yield Case(
        "logits at a temperature and an auxiliary number",
        Auxiliary(net),
        0.1,
        lambda m, x, y: F.cross_entropy(m(x)[0], y) + m(x)[1],
        lambda m, x, y: m(x)[0].argmax(1) == y,
    )


def _by_large_numbers(net: DigitsNet, data: Digits) -> Iterator[Case]:
    """Numbers that cancel, in code."""
    for number in (300.0, 700.0):
        name = f"{number:.0f} added to the features, taken off the logits"
        yield Case(name, Offset(net, number), 0.1, lambda m, x, y: F.cross_entropy(m(x), y), _classes)
    for number in (5.0, 15.0):
        prototypes = Prototypes(net.eval(), data.train_images, data.train_labels, number)
        yield Case(f"squared distances, written out, features + {number:.0f}", prototypes, 0.1, _margin, _classes)


def _margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits: Tensor = model(x)
    true = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - true).sum()


def _by_batch_norm(data: Digits, epochs: int) -> Iterator[Case]:
    """Batch norms behind a stream with a large mean."""
    cross: Call = lambda m, x, y: F.cross_entropy(m(x), y)  # noqa: E731
    for bias in (50.0, 10.0):
        torch.manual_seed(0)
        stream = PreActivation(bias)
        _fit(stream, data, epochs, cross)
        yield Case(f"batch norm behind a stream with mean {bias:.0f}", stream, 0.1, cross, _classes)


def _of_pixels(data: Digits, epochs: int) -> Case:
    """Segmentation, sure of itself."""
    torch.manual_seed(0)
    segmenter = Segmenter()
    _fit(segmenter, data, epochs, lambda m, x, y: F.cross_entropy(m(x), pixels(x, y)))
    labels = pixels(data.test_images, data.test_labels)
    sharp = copy.deepcopy(segmenter)
    sharp.factor = 10.0
    return Case(
        "segmentation, logits x 10",
        sharp,
        0.1,
        lambda m, x, y: F.cross_entropy(m(x), labels),
        lambda m, x, y: (m(x).argmax(1) == labels).float().mean((1, 2)),
    )


def _fit(model: nn.Module, data: Digits, epochs: int, loss: Call) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_images), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model, data.train_images[index], data.train_labels[index]).backward()
            optimizer.step()
    model.eval()


def attack(case: Case, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Plain PGD in Linf, as everybody writes it, from a random start."""
    found = (x + case.eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)).clamp(0, 1)
    for _ in range(steps):
        leaf = found.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(case.loss(model, leaf, y), leaf)
        found = found + 2.5 * case.eps / steps * gradient.sign()
        found = torch.minimum(torch.maximum(found, x - case.eps), x + case.eps).clamp(0, 1)
    return found.detach()


def measure(case: Case, data: Digits, steps: int, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Robust accuracy by the plain model of attacks through it and through fast models."""
    case.model.eval()
    x, y = data.test_images, data.test_labels

    def robust(model: nn.Module) -> float:
        found = attack(case, model, x, y, steps)
        with torch.no_grad():
            return case.right(case.model, found, y).float().mean().item()

    row: dict[str, Any] = {"case": case.name, "eps": case.eps, "plain": robust(case.model)}
    for dtype in dtypes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FastAttackWarning)
            fast = FastAttackModel(case.model, dtype=dtype)
            share = robust(fast)
        told = [str(w.message) for w in caught if isinstance(w.message, FastAttackWarning)]
        ran_in = sorted({str(kind.dtype).removeprefix("torch.") for kind in fast._networks.kinds.values()})
        row[str(dtype).removeprefix("torch.")] = {"robust": share, "ran in": ran_in, "warnings": told}
    return row


def table_of(rows: list[dict[str, Any]], halves: list[str]) -> Table:
    """Robust accuracies, with what each ran in if that was not what was asked for."""
    body = [
        [row["case"], f"{row['eps']:g}", f"{row['plain']:.1%}", *(_cell(row[half], half) for half in halves)]
        for row in rows
    ]
    note = (
        "Attacked by PGD in Linf, from a random start, with the loss that users of such a model take. Segmentation: "
        "the share of pixels. If a warning said that half precision is not good enough, the cell names what the model "
        "ran in."
    )
    return Table("Robust accuracy by the plain model", ["model", "eps", "plain", *halves], body, note)


def _cell(found: dict[str, Any], half: str) -> str:
    other = ", ".join(dtype for dtype in found["ran in"] if dtype != half)
    return f"{found['robust']:.1%}" + (f", in {other}" if other else "")


def main(
    images: Annotated[int, typer.Option(help="Test images.")] = 400,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of each network.")] = 20,
    only: Annotated[str, typer.Option(help="A part of the names of the cases to run.")] = "",
    float16: Annotated[bool, typer.Option(help="Whether to run float16 too, which is slow on a processor.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Attack every kind of model in half precision and plainly."""
    dtypes = (torch.bfloat16, torch.float16) if float16 else (torch.bfloat16,)
    data, rows = grey_digits(test_size=images), []
    halves = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    settings = {"images": images, "steps": steps, "epochs": epochs}
    title, command = "Models as people write them", "python -m benchmarks.precision.truth"
    report = Report("truth", title, command, settings, torch.device("cpu"), out, console)
    for case in cases(data, epochs):
        if only in case.name:
            with console.status(case.name):
                rows.append(measure(case, data, steps, dtypes))
            report.add("truth", Part([table_of(rows, halves)], {"rows": rows}), show=False)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
