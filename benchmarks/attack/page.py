"""The page of attack strengths: how far SafePGD is behind the best of the others, cell by cell."""

import importlib.metadata
import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attack.attacks import WAYS
from benchmarks.attack.budgets import NORMS
from benchmarks.attack.networks import NETWORKS, WIDTH
from benchmarks.shared.report import Table
from fastadv_adapters.comparison import versions

RANGE = (0.05, 0.9)
"""Robust accuracies, by the best attack, at which attacks can be told apart."""

OURS = tuple(way.name for way in WAYS if way.ours)
THEIRS = tuple(way.name for way in WAYS if way.theirs)
RIVALS = tuple(way.name for way in WAYS if not way.ours)

MADE = """\
Written by `python -m benchmarks.attack.strength` with adv-lib installed (`pip install --no-deps adv-lib`). The command
loads one file of adv-lib. So it does not need torchvision and visdom, which [adv-lib as a whole](../guides/adv-lib.md)
imports. Without adv-lib, `SafePGD` in L1 is compared with its other losses alone."""

INTRODUCTION = """\
The tables compare `SafePGD` with its default loss with other attacks, at equal numbers of steps. These are APGD with
both of its losses (CE and DLR) and PGD of torchattacks, the same two APGD of adv-lib, and `SafePGD` with other
losses. At worst `SafePGD`, in float32 or bfloat16, is {worst} points behind the best of the other libraries.

Numbers are robust accuracies in percent, of {images} images, and means of {seeds} seeds or more: less is stronger.
The networks were trained on digits: normally, with label smoothing (smoothed), adversarially (robust), and normally
on pairs of digits side by side, a hundred classes (hundred). Their logits are multiplied by the factor. Each of the
{cells} cells is one network, factor, norm, budget and number of steps. With each budget the best attack leaves {least}
to {most} of the images standing. *Behind* is the higher robust accuracy of `SafePGD` float32 and bfloat16, minus the
lowest one of the other libraries. An empty field is an attack that was not run there: torchattacks has no attack with a
budget in L1, and the other losses of `SafePGD` were run on some of the cells alone.

- settings: networks of width {width}; one restart each; `SafePGD` with `early_stop`, else by default; PGD with steps of
  2.5 eps / steps; adv-lib's APGD in L1 with `use_large_reps`; the other options of the libraries by default
- versions: {versions}"""

Where = tuple[str, str, str, float, int]
"""Network, factor, norm, budget, steps."""


@dataclass(frozen=True)
class Compared:
    """Mean robust accuracies at one place, by attack, and over how many seeds."""

    where: Where
    means: dict[str, float]
    seeds: int

    @property
    def best(self) -> tuple[str, float]:
        """The strongest rival and its robust accuracy: another library's, or if there is none, another loss."""
        rivals = [name for name in THEIRS if name in self.means] or [name for name in RIVALS if name in self.means]
        name = min(rivals, key=self.means.__getitem__)
        return name, self.means[name]

    @property
    def behind(self) -> float:
        """By how much the weakest of ours is behind the strongest rival, 0 to 1; negative if it is ahead."""
        return max(self.means[name] for name in OURS if name in self.means) - self.best[1]


def compared(cells: Mapping[str, Mapping[str, object]]) -> list[Compared]:
    """What can be compared: places with an attack of ours and a rival, at which some images fall and some do not."""
    found: defaultdict[Where, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells.values():
        if "robust" in cell:
            network, scale, norm, eps, steps, attack = (
                cell[name] for name in ("network", "scale", "norm", "eps", "steps", "attack")
            )
            where = (str(network), str(scale), str(norm), float(str(eps)), int(str(steps)))
            found[where][str(attack)].append(float(str(cell["robust"])))
    every = [
        Compared(where, {name: statistics.mean(v) for name, v in by.items()}, min(map(len, by.values())))
        for where, by in found.items()
        if any(name in by for name in OURS) and any(name in by for name in RIVALS)
    ]
    return [one for one in every if RANGE[0] <= min(one.means.values()) <= RANGE[1]]


def write_page(cells: Mapping[str, Mapping[str, object]], out: Path, *, images: int) -> None:
    """Write the page."""
    found = compared(cells)
    tables = [_summary(found).markdown(), _every(found).markdown()]
    text = ["# Attack strength", "", MADE, "", _intro(found, images), "", *tables]
    out.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def _intro(found: list[Compared], images: int) -> str:
    worst = max((one.behind for one in found), default=0.0)
    seeds = min((one.seeds for one in found), default=0)
    library = dict(versions())
    if importlib.util.find_spec("adv_lib"):
        library["adv-lib"] = importlib.metadata.version("adv-lib")
    return INTRODUCTION.format(
        worst=f"{100 * worst:.1f}",
        images=images,
        seeds=seeds,
        width=WIDTH,
        cells=len(found),
        least=f"{RANGE[0]:.0%}",
        most=f"{RANGE[1]:.0%}",
        versions=", ".join(f"{name} {version}" for name, version in library.items()),
    )


def _summary(found: list[Compared]) -> Table:
    by: defaultdict[tuple[str, str, int], list[Compared]] = defaultdict(list)
    for one in found:
        network, _, norm, _, steps = one.where
        by[network, norm, steps].append(one)
    places = sorted(by, key=lambda place: (NETWORKS.index(place[0]), NORMS.index(place[1]), place[2]))
    rows = [
        [*map(str, place), str(len(by[place])), *(f"{100 * f(o.behind for o in by[place]):+.1f}" for f in (max, _mean))]
        for place in places
    ]
    columns = ("network", "norm", "steps", "cells", "most behind", "mean")
    return Table("In short", columns, rows, "Points behind the best attack of the other libraries; negative is ahead.")


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _every(found: list[Compared]) -> Table:
    names = [name for name in (*OURS, *RIVALS) if any(name in one.means for one in found)]
    rows = [
        [*map(str, one.where), *(f"{100 * one.means[n]:.1f}" if n in one.means else "" for n in names), _behind(one)]
        for one in found
    ]
    return Table("Every cell", ("network", "factor", "norm", "eps", "steps", *names, "behind"), rows)


def _behind(one: Compared) -> str:
    return f"{100 * one.behind:+.1f}"
