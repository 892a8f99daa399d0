"""`python -m benchmarks.attack.training_mode`: what do attacks with batch norm in training mode bring?

Much published code attacks a network in training mode: batch norm then normalises by the statistics of the attacked
batch, and its running statistics move in every step. Digits networks are trained by PGD in eval mode, in training mode,
in training mode with the running statistics put back after each attack, and on a fast model with batch statistics, from
the same seeds. They are attacked in both modes. Every verdict is that of the network in eval mode, which is deployed.
"""

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attack.networks import TEST_SIZE, WIDTH
from benchmarks.shared.report import OUT, Part, Report, Table
from digits import Digits, DigitsNet, accuracy, grey_digits, train
from fastadv_adapters import FastAttackModel, FastAttackWarning, SafePGD, with_batch_statistics

EPS = 0.15
FAST = "fast, batch statistics"
MODES = ("eval", "training", "training, statistics kept", FAST)
"""How a network is attacked while it is trained."""
VERDICTS = ("clean", "SafePGD", "PGD, eval", "PGD, training")
console = Console()


def pgd(net: nn.Module, x: Tensor, y: Tensor, *, steps: int, training: bool) -> Tensor:
    """PGD (Madry et al. 2018) by hand on the network in a mode; what that does to its running statistics stays."""
    net.train(training)
    found = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(found), y), found)
        found = found.detach() + 2.5 * EPS / steps * gradient.sign()
        found = torch.minimum(torch.maximum(found, x - EPS), x + EPS).clamp(0, 1)
    net.eval()
    return found.detach()


def keeping(net: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """The same in training mode, with the running statistics put back."""
    kept = [buffer.clone() for buffer in net.buffers()]
    found = pgd(net, x, y, steps=steps, training=True)
    for buffer, before in zip(net.buffers(), kept, strict=True):
        buffer.copy_(before)
    return found


def trained(data: Digits, *, mode: str, seed: int, epochs: int, steps: int, width: int) -> nn.Module:
    """A network trained on what PGD makes of it in a mode."""
    torch.manual_seed(seed)
    net = DigitsNet(width=width)
    attack = attack_on(net, mode, steps=steps)
    train(net, data.train_images, data.train_labels, attack=attack, epochs=epochs, seed=seed, show_progress=False)
    return net


def attack_on(net: nn.Module, mode: str, *, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """PGD on a network in a mode."""
    if mode == FAST:
        fast = FastAttackModel(with_batch_statistics(net))
        return lambda x, y: pgd(fast, x, y, steps=steps, training=False)
    if mode == "training, statistics kept":
        return lambda x, y: keeping(net, x, y, steps=steps)
    return lambda x, y: pgd(net, x, y, steps=steps, training=mode == "training")


def judged(net: nn.Module, data: Digits, *, steps: int) -> dict[str, float]:
    """Accuracy of the network in eval mode on clean images, and under attacks in both modes."""
    x, y = data.test_images, data.test_labels
    attacks: dict[str, Callable[[], Tensor]] = {
        "clean": lambda: x,
        "SafePGD": lambda: SafePGD(net, eps=EPS, steps=steps, generator=torch.Generator().manual_seed(0))(x, y),
        "PGD, eval": lambda: pgd(net, x, y, steps=steps, training=False),
        "PGD, training": lambda: keeping(net, x, y, steps=steps),
    }
    return {name: accuracy(net, attack(), y) for name, attack in attacks.items()}


def table(records: list[dict[str, Any]]) -> Table:
    """A row for each mode and seed, and the means."""
    rows = [[r["mode"], str(r["seed"]), *(f"{r[name]:.1%}" for name in VERDICTS)] for r in records]
    for mode in MODES:
        if found := [r for r in records if r["mode"] == mode]:
            rows.append([mode, "mean", *(f"{statistics.mean(r[name] for r in found):.1%}" for name in VERDICTS)])
    note = (
        f"Share of the test images that the network in eval mode gets right, clean and attacked at eps {EPS}, with one "
        "restart. The last two columns are attacks that judge, on the network in that mode. The rows are attacks while "
        "training: PGD on the network in eval mode; in training mode; likewise, with the running statistics put back "
        "after each attack; on a FastAttackModel of with_batch_statistics. In the settings, *steps* is the number "
        "of steps of attacks while training, *judging* that of the attacks that judge. "
        "[How it works](../how-it-works.md#attacks-in-training-mode) says more."
    )
    return Table("Trained with attacks in either mode", ("attacks while training", "seed", *VERDICTS), rows, note)


def main(
    seeds: Annotated[int, typer.Option(help="Networks for each mode.")] = 3,
    epochs: Annotated[int, typer.Option(help="Of the training.")] = 10,
    steps: Annotated[int, typer.Option(help="Steps of the attack in training.")] = 7,
    judging: Annotated[int, typer.Option(help="Steps of the attacks that judge.")] = 50,
    images: Annotated[int, typer.Option(help="Test images.")] = TEST_SIZE,
    width: Annotated[int, typer.Option(help="Of the networks.")] = WIDTH,
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Train digits networks by attacks in eval mode and in training mode, and attack them in both."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", ".*#samples-coupled", FastAttackWarning)  # as batch statistics have it
    settings = {"seeds": seeds, "epochs": epochs, "steps": steps, "judging": judging, "images": images, "width": width}
    title, command = "Attacks in training mode", "python -m benchmarks.attack.training_mode"
    report = Report("training-mode", title, command, settings, torch.device("cpu"), out, console)
    data = grey_digits(test_size=images)
    records: list[dict[str, Any]] = []
    for seed in range(seeds):
        for mode in MODES:
            net = trained(data, mode=mode, seed=seed, epochs=epochs, steps=steps, width=width)
            records.append({"mode": mode, "seed": seed, **judged(net, data, steps=judging)})
            console.print(", ".join(f"{k} {v}" for k, v in records[-1].items()))
            report.add("training-mode", Part([table(records)], records), show=False)
    report.add("training-mode", Part([table(records)], records))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
