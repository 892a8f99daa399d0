"""`python -m benchmarks.attack.training`: adversarial training through the plain model and through the fast one.

Both ways begin at the same weights, and see the same images in the same order. They take their epochs in turn, in one
process, so that a slow phase of the machine meets both. Each pair of runs is kept: a command that was stopped goes on.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torchattacks
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attack.curves import draw
from benchmarks.attack.kept import CACHE, Kept
from benchmarks.attack.networks import TEST_SIZE
from benchmarks.attack.trades import EPS, Maximiser, by_hand, by_safe_pgd, clean_probabilities, judged, trades_loss
from benchmarks.shared.report import OUT, Part, Report, Table
from digits import Digits, DigitsNet, grey_digits
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import synchronize

METHODS = {"pgd": "PGD training", "trades": "TRADES"}
WAYS = ("plain", "fast")
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 % by degrees of freedom."""
ATTACKS = {
    "pgd": ("torchattacks.PGD", "the same on a FastAttackModel with default options"),
    "trades": ("the inner loop of the authors' code", "SafePGD on a FastAttackModel with default options"),
}
CURVE = 200
"""Test images after each epoch but the last."""
COLUMNS = ("way", "clean", "robust", "s per epoch", "of which attacks")
LEGEND = (
    "Per cent on {images} test images, mean (least to largest) of {seeds} seeds; robust under SafePGD-20, eps {eps} in "
    "L-infinity, float32, judged by the plain network. Seconds: medians over all epochs but the first of each run. "
    "Difference: fast less plain, seed by seed, in points, with its 95 % interval. Ratio: plain by fast, epoch by "
    "epoch. These digits show whether both ways of training give the same result; they are too small to prove accuracy "
    "on real data."
)
NOTE = "Plain is {plain}, fast is {fast}, in {dtype} here.{verdict}"
console = Console()


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    width: int
    epochs: int
    steps: int
    images: int
    batch: int


class Training:
    """One network in training, one way."""

    def __init__(self, data: Digits, method: str, way: str, sizes: Sizes, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.method, self.seed, self.sizes = data, method, seed, sizes
        self.device = data.train_images.device
        self.net = DigitsNet(width=sizes.width).to(self.device)
        self.maximise = maximiser(self.net, method, way, steps=sizes.steps)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-2)
        self.steps = len(self.order(0)) * sizes.epochs
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=self.steps)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """The batches of an epoch."""
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(self.sizes.images, generator=generator)
        return torch.split(order, self.sizes.batch)

    def epoch(self, number: int) -> tuple[float, float]:
        """Train for an epoch; returns its seconds, and those of its attacks."""
        torch.manual_seed(1000 * self.seed + number)  # the attacks' noise
        began, attacks = self._now(), 0.0
        for batch in self.order(number):
            x, y = self.data.train_images[batch], self.data.train_labels[batch]
            before = self._now()
            adversarial = self.maximise(x, y if self.method == "pgd" else clean_probabilities(self.net, x))
            attacks += self._now() - before
            self.net.train()
            self.optimizer.zero_grad()
            self._loss(x, adversarial, y).backward()
            self.optimizer.step()
            self.schedule.step()
        return self._now() - began, attacks

    def _loss(self, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        if self.method == "pgd":
            return F.cross_entropy(self.net(adversarial), y)
        return trades_loss(self.net, x, adversarial, y)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def judged(self, images: int) -> tuple[float, float]:
        """Clean and robust accuracy, 0 to 1, on the first test images."""
        self.net.eval()
        few = {"test_images": self.data.test_images[:images], "test_labels": self.data.test_labels[:images]}
        return judged(self.net, self.data._replace(**few))


def maximiser(net: DigitsNet, method: str, way: str, *, steps: int) -> Maximiser:
    """The inner attack: as people write it for a plain model, and as they write it for a fast one."""
    if method == "pgd":
        model = FastAttackModel(net) if way == "fast" else net
        attack: Maximiser = torchattacks.PGD(model, eps=EPS, alpha=2.5 * EPS / steps, steps=steps)
        return attack
    return by_safe_pgd(net, "auto", steps=steps) if way == "fast" else by_hand(net, steps=steps)


def pair(data: Digits, method: str, sizes: Sizes, *, seed: int) -> dict[str, Any]:
    """Both ways from one seed, their epochs in turn: accuracies after each epoch, and seconds."""
    runs = {way: Training(data, method, way, sizes, seed=seed) for way in WAYS}
    found: dict[str, dict[str, list[float]]] = {
        way: {"clean": [], "robust": [], "seconds": [], "attack_seconds": []} for way in WAYS
    }
    every = len(data.test_images)
    for number in track(range(sizes.epochs), f"{METHODS[method]}, seed {seed}", console=console):
        for way in WAYS if number % 2 else reversed(WAYS):
            images = every if number == sizes.epochs - 1 else CURVE
            numbers = (*runs[way].epoch(number), *runs[way].judged(images))
            for name, value in zip(("seconds", "attack_seconds", "clean", "robust"), numbers, strict=True):
                found[way][name].append(value)
    return found


def difference(cells: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float | None]:
    """Mean over the seeds of fast less plain at the end, and half of its 95 % interval (None of a single seed)."""
    values = [cell["fast"][name][-1] - cell["plain"][name][-1] for cell in cells]
    if len(values) < 2:
        return values[0], None
    factor = STUDENT.get(len(values) - 1, 1.96)
    return statistics.mean(values), factor * statistics.stdev(values) / len(values) ** 0.5


def later(cell: Mapping[str, Any], way: str, name: str) -> list[float]:
    """Seconds of all epochs but the first, in which the fast model is built and checked; of a single one, that."""
    seconds: list[float] = cell[way][name]
    return seconds[1:] or seconds


def ratio(cells: Sequence[Mapping[str, Any]], name: str) -> float:
    """Median over seeds and epochs of plain seconds by fast ones."""
    pairs = [zip(later(c, "plain", name), later(c, "fast", name), strict=True) for c in cells]
    return statistics.median(plain / fast for plain, fast in itertools.chain(*pairs))


def default_dtype(data: Digits, sizes: Sizes) -> str:
    """What a fast model of these sizes runs in by default options."""
    fast = FastAttackModel(DigitsNet(width=sizes.width).to(data.train_images.device))
    fast(data.train_images[: sizes.batch].clone().requires_grad_())
    return str(fast.dtype).removeprefix("torch.")


def part(cells: Sequence[Mapping[str, Any]], method: str, data: Digits, dtype: str) -> Part:
    """The table of one method, and all its numbers."""
    rows = []
    for way in WAYS:
        shares = [[100 * cell[way][name][-1] for cell in cells] for name in ("clean", "robust")]
        told = [f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in shares]
        for name in ("seconds", "attack_seconds"):
            told.append(f"{statistics.median(s for cell in cells for s in later(cell, way, name)):.2f}")
        rows.append([way, *told])
    apart = [difference(cells, name) for name in ("clean", "robust")]
    ratios = [ratio(cells, name) for name in ("seconds", "attack_seconds")]
    points = [f"{100 * mean:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}") for mean, half in apart]
    rows.append(["difference, ratio", *points, *(f"{r:.2f}x" for r in ratios)])
    plain, fast = ATTACKS[method]
    mean, half = apart[1]
    place = "outside" if half is not None and abs(mean) > half else "inside"
    verdict = "" if half is None else f" For robust accuracy 0 lies {place} the interval."
    note = NOTE.format(plain=plain, fast=fast, verdict=verdict, dtype=dtype)
    legend = LEGEND.format(images=len(data.test_images), seeds=len(cells), eps=EPS)
    record = {
        "seeds": list(cells),
        "difference": dict(zip(("clean", "robust"), apart, strict=True)),
        "ratio": dict(zip(("seconds", "attack_seconds"), ratios, strict=True)),
    }
    return Part([Table(METHODS[method], COLUMNS, rows, note, legend)], record)


def main(
    methods: Annotated[str, typer.Option(help="pgd, trades; with commas between.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="Pairs of networks per method.")] = 5,
    width: Annotated[int, typer.Option(help="Channels of the first stage.")] = 32,
    epochs: Annotated[int, typer.Option(help="Of each training.")] = 10,
    steps: Annotated[int, typer.Option(help="Of the inner attack.")] = 10,
    images: Annotated[int, typer.Option(help="To train on, at most 1400.")] = 1400,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for what has been run.")] = CACHE,
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and picture.")] = OUT,
) -> None:
    """Train in both ways, and write tables and curves after every pair; what is there from an earlier run is kept."""
    torch.set_num_threads(threads)
    names = [name.strip() for name in methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    sizes = Sizes(width, epochs, steps, images, batch)
    data = Digits(*(tensor.to(device) for tensor in grey_digits(test_size=TEST_SIZE)))
    kept = Kept(cache / f"training-{device}-{'-'.join(map(str, asdict(sizes).values()))}.json")
    command = "python -m benchmarks.attack.training"
    settings = {**asdict(sizes), "eps": EPS, "seeds": seeds, "threads": threads}
    report = Report("training", "Adversarial training", command, settings, torch.device(device), out, console)
    dtype = default_dtype(data, sizes)
    for method in names:
        cells: list[dict[str, Any]] = []
        for seed in range(seeds):
            if f"{method}|{seed}" not in kept.cells:
                kept.put(f"{method}|{seed}", pair(data, method, sizes, seed=seed))
            cells.append(kept.cells[f"{method}|{seed}"])
            report.add(method, part(cells, method, data, dtype), show=seed == seeds - 1)
            report.picture = report.path("png")
            draw({METHODS[key]: record["seeds"] for key, record in report.results.items()}, report.picture)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
