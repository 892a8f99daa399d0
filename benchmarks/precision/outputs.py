"""How far may outputs be off in half precision before attacks get weaker?

Run with `python -m benchmarks.precision.outputs`. Small residual networks with random weights get heads whose logits
vary by the same amount from image to image. The less their features vary, the more such logits are differences of large
numbers, and the more half precision puts them off. The self-check and the audit are told to take any outputs; then PGD
through the fast model is compared with PGD through the plain one.
"""

import statistics
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared.networks import resnet18
from benchmarks.shared.report import OUT, Part, Report, Table
from fastadv_adapters import FastAttackModel
from fastadv_adapters.networks import auditing, nearness, trial

CONTRASTS = (0.1, 0.2, 0.4, 1.0, 4.0)
"""By so much the weights of the first layer are multiplied, in front of a batch norm."""
BUDGETS = (0.004, 0.01)
SPREAD = 3.0
"""The standard deviation that each logit is given, over images."""
console = Console()

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Summed."""
    return F.cross_entropy(logits, y, reduction="sum")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The largest other logit less that of the label, summed."""
    true = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - true).sum()


def network(seed: int, contrast: float, images: Tensor) -> nn.Module:
    """In eval mode, with statistics of these images."""
    torch.manual_seed(seed)
    net = resnet18(width=8)
    stem, head = net.get_submodule("stem.0.0"), net.head
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.bias.normal_(0, 0.3)
                part.weight.uniform_(0.5, 1.5)
        for _ in range(20):
            net(images)
        net.eval()
        stem.get_parameter("weight").mul_(contrast)
        logits = net(images)
        factor = SPREAD / logits.std(0)
        head.weight.mul_(factor[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * factor)
    return net


def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, loss: Loss) -> Tensor:
    """PGD of ten steps in Linf, from a random start."""
    found = (x + eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)).clamp(0, 1)
    for _ in range(10):
        leaf = found.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(leaf), y), leaf)
        found = torch.clamp(found.detach() + eps / 4 * gradient.sign(), x - eps, x + eps).clamp(0, 1)
    return found


def measure(seed: int, contrast: float, x: Tensor) -> dict[str, Any]:
    """One network: how far outputs are off, and by how many points in a hundred robust accuracy is overestimated."""
    net = network(seed, contrast, x[:200])
    with torch.no_grad():
        y, exact = net(x).argmax(1), net(x[:64])
    any_outputs = patch.object(trial, "FAR", torch.inf), patch.object(auditing, "FAR", torch.inf)
    with warnings.catch_warnings(), any_outputs[0], any_outputs[1]:
        warnings.simplefilter("ignore")
        fast = FastAttackModel(net, dtype=torch.bfloat16)
        off = nearness.farthest([fast(x[:64].clone().requires_grad_()).detach()], [exact])
        behind = {}
        for eps, loss in product(BUDGETS, (cross_entropy, margin)):
            plain, ours = (robust(net, attack(model, x, y, eps, loss), y) for model in (net, fast))
            behind[f"{loss.__name__} {eps:g}"] = 100 * (ours - plain)
    return {"seed": seed, "contrast": contrast, "off": off, "behind": behind}


def robust(net: nn.Module, found: Tensor, y: Tensor) -> float:
    """By the plain model."""
    with torch.no_grad():
        return float((net(found).argmax(1) == y).float().mean())


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The least off first."""
    body = [
        [f"{r['off']:.1%}", f"{statistics.mean(r['behind'].values()):+.2f}", f"{max(r['behind'].values()):+.2f}"]
        for r in sorted(rows, key=lambda r: r["off"])
    ]
    note = (
        "Outputs off: error of the outputs of the median of 64 images, as a share of the image's largest output. "
        "Behind: robust accuracy after the attack through the fast model in bfloat16, minus that after the attack on "
        "the plain model, in percentage points, both judged by the plain model; mean and largest of four attacks: PGD "
        f"with 10 steps in L-infinity, eps {' and '.join(map(str, BUDGETS))}, cross entropy and margin. Each row is a "
        "residual network of width 8 on images of noise that it has labelled itself. The limit on outputs is switched "
        f"off here; audits of gradients are not. By default a model whose outputs are off by more than "
        f"{nearness.FAR:.0%} runs in float32."
    )
    return Table("Networks with random weights", ["outputs off", "behind, mean", "behind, most"], body, note)


def main(
    images: Annotated[int, typer.Option(help="Images of noise.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Networks for each contrast.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Attack networks whose outputs bfloat16 puts off more and more."""
    x = torch.rand(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"images": images, "seeds": seeds}
    title, command = "How far outputs may be off", "python -m benchmarks.precision.outputs"
    report = Report("outputs", title, command, settings, torch.device("cpu"), out, console)
    rows: list[dict[str, Any]] = []
    for seed, contrast in track(list(product(range(seeds), CONTRASTS)), console=console):
        rows.append(measure(seed, contrast, x))
        report.add("outputs", Part([table_of(rows)], {"rows": rows}), show=False)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
