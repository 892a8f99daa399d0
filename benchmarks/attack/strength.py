"""`python -m benchmarks.attack.strength`: is SafePGD with its default loss as strong as the best of other attacks?"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.attack.attacks import WAYS, Task, Way, ways_here
from benchmarks.attack.budgets import NORMS, Norm
from benchmarks.attack.kept import CACHE, Kept
from benchmarks.attack.networks import NETWORKS, TEST_SIZE, Scaled, Subject, subject
from benchmarks.attack.page import write_page
from digits import accuracy

SCALES = {"1/100": 0.01, "1/16": 1 / 16, "1": 1.0, "16": 16.0}
console = Console()


@dataclass(frozen=True)
class Plan:
    """What is to be run: names of everything, and how often."""

    networks: tuple[str, ...]
    scales: tuple[str, ...]
    norms: tuple[Norm, ...]
    steps: tuple[int, ...]
    ways: tuple[Way, ...]
    seeds: int
    images: int


def main(
    networks: Annotated[str, typer.Option(help="With commas between; all if none is named.")] = "",
    scales: Annotated[str, typer.Option(help="Factors of the logits: 1/100, 1/16, 1, 16.")] = "",
    norms: Annotated[str, typer.Option(help="linf, l2, l1.")] = "",
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "10,50",
    attacks: Annotated[str, typer.Option(help="Attacks by name.")] = "",
    seeds: Annotated[int, typer.Option(help="Runs per cell.")] = 3,
    images: Annotated[int, typer.Option(help="Test images per network.")] = TEST_SIZE,
    run: Annotated[bool, typer.Option(help="--no-run only writes the page of what has been run.")] = True,
    cache: Annotated[Path, typer.Option(help="Folder for networks and results.")] = CACHE,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("docs/benchmarks/attack-strength.md"),
) -> None:
    """Attack every network in every way; what is there from an earlier run is kept."""
    names = _known(attacks, tuple(way.name for way in WAYS))
    plan = Plan(
        _known(networks, NETWORKS),
        _known(scales, tuple(SCALES)),
        tuple(norm for norm in NORMS if norm in _known(norms, NORMS)),
        tuple(int(count) for count in steps.split(",")),
        tuple(way for way in (WAYS if attacks else ways_here()) if way.name in names),
        seeds,
        images,
    )
    kept = Kept(cache / f"strength-{images}.json")
    if run:
        for name in plan.networks:
            _run(plan, subject(name, cache, images=images), kept)
    write_page(kept.cells, out, images=images)
    console.print(f"written: {out}")


def _known(names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names given, or all that are known; an error for one that is not."""
    given = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {name}")
    return given or known


def _run(plan: Plan, target: Subject, kept: Kept) -> None:
    budgets = _budgets(plan, target, kept)
    for cell in track(list(_cells(plan, target, budgets)), target.name, console=console):
        key = "|".join(map(str, cell.values()))
        if key not in kept.cells:
            kept.put(key, {**cell, "robust": _robust(target, cell)})


def _budgets(plan: Plan, target: Subject, kept: Kept) -> dict[Norm, list[float]]:
    """Budgets by norm, found once."""
    found: dict[Norm, list[float]] = {}
    for norm in plan.norms:
        key = f"budgets|{target.name}|{norm}"
        if key not in kept.cells:
            kept.put(key, {"budgets": list(target.budgets(norm))})
        found[norm] = kept.cells[key]["budgets"]  # type: ignore[assignment]
    return found


def _cells(plan: Plan, target: Subject, budgets: dict[Norm, list[float]]) -> Iterator[dict[str, object]]:
    for norm, steps, scale in itertools.product(plan.norms, plan.steps, plan.scales):
        for eps, way, seed in itertools.product(budgets[norm], plan.ways, range(plan.seeds)):
            if norm in way.norms:
                cell = {"network": target.name, "scale": scale, "norm": norm, "eps": eps, "steps": steps}
                yield {**cell, "attack": way.name, "seed": seed}


def _robust(target: Subject, cell: dict[str, object]) -> float:
    """Robust accuracy, judged by the plain network."""
    model = Scaled(target.net, SCALES[str(cell["scale"])]).eval()
    (way,) = (way for way in WAYS if way.name == cell["attack"])
    task = Task(cell["norm"], float(str(cell["eps"])), int(str(cell["steps"])), int(str(cell["seed"])))  # type: ignore[arg-type]
    torch.manual_seed(task.seed)
    return accuracy(model, way.make(model, task)(target.images, target.labels), target.labels)


if __name__ == "__main__":
    typer.run(main)
