"""`python -m benchmarks.attack.trades`: TRADES with SafePGD as its inner maximiser against a hand-written one.

TRADES is by Zhang et al. 2019, https://arxiv.org/abs/1901.08573.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attack.kept import CACHE, Kept
from benchmarks.attack.networks import TEST_SIZE, WIDTH
from benchmarks.shared.report import Table
from digits import Digits, DigitsNet, accuracy, grey_digits
from fastadv_adapters import FastAttackModel, SafePGD

EPS, STEPS, BETA = 0.15, 5, 6.0
BY_HAND = "by hand"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Maximiser = Callable[[Tensor, Tensor], Tensor]
console = Console()


def main(
    dtypes: Annotated[str, typer.Option(help="Of the fast model, with commas between.")] = ",".join(DTYPES),
    seeds: Annotated[int, typer.Option(help="Networks per way.")] = 3,
    epochs: Annotated[int, typer.Option(help="Of training.")] = 10,
    cache: Annotated[Path, typer.Option(help="Folder for results.")] = CACHE,
) -> None:
    """Train, attack, and print robust accuracies; what is there from an earlier run is kept."""
    names = [BY_HAND, *dtypes.split(",")]
    for name in names[1:]:
        if name not in DTYPES:
            raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {name}")
    data, kept = grey_digits(test_size=TEST_SIZE), Kept(cache / f"trades-{epochs}.json")
    for name, seed in [(name, seed) for name in names for seed in range(seeds)]:
        if f"{name}|{seed}" not in kept.cells:
            net = trained(data, name, seed=seed, epochs=epochs)
            kept.put(f"{name}|{seed}", dict(zip(("clean", "robust"), judged(net, data), strict=True)))
    rows = []
    for name in names:
        cells = [kept.cells[f"{name}|{seed}"] for seed in range(seeds)]
        rows.append([name, *(_mean_and_range([float(str(c[key])) for c in cells]) for key in ("clean", "robust"))])
    note = f"Per cent, mean and range of {seeds} seeds; eps {EPS} in L-infinity, judged by SafePGD-20 in float32."
    Table("TRADES on digits", ("inner maximiser", "clean", "robust"), rows, note).show(console)


def trained(data: Digits, name: str, *, seed: int, epochs: int) -> nn.Module:
    """A network trained with TRADES."""
    torch.manual_seed(seed)
    net = DigitsNet(width=WIDTH)
    maximise = by_hand(net) if name == BY_HAND else by_safe_pgd(net, DTYPES[name])
    batches = [b for _ in range(epochs) for b in torch.randperm(len(data.train_images)).split(64)]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(batches))
    for batch in track(batches, f"{name}, seed {seed}", console=console):
        x, y = data.train_images[batch], data.train_labels[batch]
        adversarial = maximise(x, clean_probabilities(net, x))
        net.train()
        optimizer.zero_grad()
        trades_loss(net, x, adversarial, y).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def clean_probabilities(net: nn.Module, x: Tensor) -> Tensor:
    """What the network says of clean images, in eval mode, (N, C); it stays in that mode."""
    net.eval()
    with torch.no_grad():
        logits: Tensor = net(x)
        return logits.softmax(1)


def trades_loss(net: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
    """The loss that is trained on, a scalar."""
    logits = net(x)
    distance = F.kl_div(net(adversarial).log_softmax(1), logits.softmax(1), reduction="batchmean")
    return F.cross_entropy(logits, y) + BETA * distance


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """What the inner maximiser raises, (N,)."""
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)


def by_hand(net: nn.Module, *, steps: int = STEPS) -> Maximiser:
    """The loop of the authors' code: it begins beside x, and its steps have one size."""

    def maximise(x: Tensor, clean: Tensor) -> Tensor:
        found = x + 1e-3 * torch.randn_like(x)
        for _ in range(steps):
            found.requires_grad_(True)
            (gradient,) = torch.autograd.grad(divergence(net(found), clean).sum(), found)
            found = found.detach() + 2.5 * EPS / steps * gradient.sign()
            found = torch.min(torch.max(found, x - EPS), x + EPS).clamp(0, 1)
        return found

    return maximise


def by_safe_pgd(net: nn.Module, dtype: torch.dtype | Literal["auto"], *, steps: int = STEPS) -> Maximiser:
    """The same start, steps and loss; the best candidate is returned instead of the last."""
    fast = FastAttackModel(net, dtype=dtype)
    return SafePGD(fast, eps=EPS, alpha=2.5 * EPS / steps, steps=steps, random_start=False, loss=divergence)


def judged(net: nn.Module, data: Digits) -> tuple[float, float]:
    """Clean and robust accuracy on all test images."""
    x, y = data.test_images, data.test_labels
    fast = FastAttackModel(net, dtype=torch.float32)
    attack = SafePGD(fast, eps=EPS, steps=20, early_stop=True, generator=torch.Generator().manual_seed(0))
    return accuracy(net, x, y), accuracy(net, attack(x, y), y)


def _mean_and_range(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    typer.run(main)
