"""The picture of adversarial training: robust accuracy by epoch and by seconds, plain and fast."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "0.55", "linestyle": "-", "marker": "o", "markersize": 6, "linewidth": 2.4},
    "fast": {"color": "0.0", "linestyle": "--", "marker": "s", "markersize": 4, "linewidth": 1.2},
}
"""Told apart without colours: a broad grey line with circles, and a thin black one of dashes with squares."""

Cells = Sequence[Mapping[str, Any]]


def draw(methods: Mapping[str, Cells], path: Path) -> None:
    """Draw a row of two panels per method: robust accuracy by epoch, with the range over the seeds, and by seconds.

    Args:
        methods: title to the pairs of runs of all seeds.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1 * len(methods)), layout="constrained")
    for row, (title, cells) in zip(figure.subplots(len(methods), 2, squeeze=False), methods.items(), strict=True):
        for way, style in STYLES.items():
            accuracies = [
                [100 * value for value in values] for values in zip(*(c[way]["robust"] for c in cells), strict=True)
            ]
            means, epochs = [statistics.mean(a) for a in accuracies], range(1, len(accuracies) + 1)
            row[0].plot(epochs, means, label=way, **style)
            row[0].fill_between(
                epochs,
                list(map(min, accuracies)),
                list(map(max, accuracies)),
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
            row[1].plot(_seconds(cells, way), means, label=way, **style)
        for axes, place in zip(row, ("epoch", "seconds of training, median of the seeds"), strict=True):
            axes.set(title=title, xlabel=place, ylabel="robust accuracy, %")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _seconds(cells: Cells, way: str) -> list[float]:
    """Seconds until the end of each epoch, the median of the seeds."""
    return list(
        itertools.accumulate(statistics.median(s) for s in zip(*(c[way]["seconds"] for c in cells), strict=True))
    )
