"""Pictures of a report, readable in black and white."""

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..comparison import extent, write_picture
from ..modules import need
from .rows import CLEAN, Row

LETTER = 0.07
"""About how wide a letter beside the images is, in inches."""

DARK, LIGHT = "#264653", "#a8b8c0"

BARS = 24
"""How many bars there are at most."""


def draw_report(
    by_attack: dict[str, float], curve: dict[float, float], rows: Sequence[Row], path: str | os.PathLike[str]
) -> None:
    """Draw accuracy attack by attack, passes per sample, and robust accuracy by budget if there are several."""
    panels = 3 if len(curve) > 1 else 2
    figure, [axes] = _figure([4.0] * panels, height=3.2)
    _draw_attacks(axes[0], by_attack)
    _draw_passes(axes[1], rows)
    if len(curve) > 1:
        _draw_curve(axes[2], curve)
    write_picture(path, figure)


def draw_triples(
    shown: Sequence[tuple[Row, Tensor, Tensor]], bounds: tuple[float, ...], path: str | os.PathLike[str]
) -> None:
    """Draw clean image, perturbation and adversarial, a row for each sample, and beside it what became of it.

    Values between the bounds (of the images themselves, if bounds have no end) go from black to white. In a
    perturbation grey is none, and its largest change is black or white.
    """
    if any(clean.ndim not in (2, 3) for _, clean, _ in shown):
        raise ValueError(
            f"expected images of shape (C, H, W) or (H, W), got {tuple(shown[0][1].shape)}: draw others yourself, from "
            f"adversarials()"
        )
    lower, upper = bounds if extent(bounds) else _ends(shown)
    changes = [adversarial.double() - clean.double() for _, clean, adversarial in shown]
    peaks = [float(change.abs().max()) for change in changes]
    labels = [label_of(row, peak) for (row, _, _), peak in zip(shown, peaks, strict=True)]
    beside = LETTER * max(len(line) for label in labels for line in label.splitlines())
    figure, axes = _figure([beside, 1.4, 1.4, 1.4], height=0.3 + 1.4 * len(shown), rows=len(shown))
    for place, ((_, clean, adversarial), change, peak) in enumerate(zip(shown, changes, peaks, strict=True)):
        seen = [(image.double() - lower) / (upper - lower) for image in (clean, adversarial)]
        for axis, picture in zip(axes[place][1:], (seen[0], change / (2 * (peak or 1)) + 0.5, seen[1]), strict=True):
            axis.imshow(_as_image(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[place][0].axis("off")
        axes[place][0].text(0, 0.5, labels[place], fontsize=8, va="center")
    for axis, title in zip(axes[0][1:], ("clean", "perturbation", "adversarial"), strict=True):
        axis.set_title(title, fontsize=9)
    write_picture(path, figure)


def _ends(shown: Sequence[tuple[Row, Tensor, Tensor]]) -> tuple[float, float]:
    """The least and the largest value of all images."""
    extremes = [e for _, *images in shown for image in images for e in image.double().aminmax()]
    return float(min(extremes)), float(max(extremes))


def label_of(row: Row, largest: float) -> str:
    """What became of a broken sample, whose largest change is given."""
    return (
        f"sample {row.index}\nclass {row.label}, seen as {row.prediction}\nbroken by {row.broken_by}\n"
        f"within eps {row.eps:.4g}\nlargest change {largest:.3g}"
    )


def _figure(widths: Sequence[float], *, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure that belongs to no window and to no list of open ones, in inches; axes by row and column."""
    size = sum(widths), height
    figure = need("matplotlib.figure", extra="evaluate").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)


def _draw_attacks(axis: Any, by_attack: dict[str, float]) -> None:
    names = list(by_attack)
    values = [100 * by_attack[name] for name in names]
    colours = [LIGHT if name == CLEAN else DARK for name in names]
    bars = axis.barh(range(len(names)), values, color=colours, edgecolor="black", linewidth=0.6)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 125), xticks=range(0, 101, 20), xlabel="accuracy in %", title="after each attack")


def _draw_passes(axis: Any, rows: Sequence[Row]) -> None:
    attacked = [row for row in rows if row.broken_by != CLEAN]
    groups = {"broken": [], "standing": []}  # type: dict[str, list[float]]
    for row in attacked:
        if row.forward is not None and row.backward is not None:
            groups["standing" if row.broken_by is None else "broken"].append(row.forward + row.backward)
    values = [groups["broken"], groups["standing"]]
    locator = need("matplotlib.ticker", extra="evaluate").MaxNLocator
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(locator(nbins=5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if any(values):
        edges = _edges([passes for some in values for passes in some])
        counts, _, _ = axis.hist(
            values, bins=edges, stacked=True, color=[LIGHT, DARK], edgecolor="black", linewidth=0.5, label=list(groups)
        )
        axis.set_ylim(0, 1.35 * counts.max())  # room for the legend
        axis.legend(fontsize=8, ncols=2, loc="upper right")
    else:
        axis.text(0.5, 0.5, "none were counted", ha="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
    axis.set(xlabel="forward and backward passes", ylabel="samples", title="passes per sample")


def _edges(passes: Sequence[float]) -> list[float]:
    """Edges of at most ``BARS`` bars, each of which stands for as many whole numbers as any other."""
    first, last = math.floor(min(passes)), math.ceil(max(passes))
    width = math.ceil((last - first + 1) / BARS)
    return [first - 0.5 + width * bar for bar in range((last - first) // width + 2)]


def _draw_curve(axis: Any, curve: dict[float, float]) -> None:
    budgets = sorted(curve)
    axis.plot(budgets, [100 * curve[eps] for eps in budgets], color=DARK, marker="o")
    axis.set(ylim=(0, 100), xlabel="eps", ylabel="robust accuracy in %", title="by budget")
    axis.grid(alpha=0.3)


def _as_image(picture: Tensor) -> Any:
    """What matplotlib draws: (H, W), or (H, W, 3)."""
    if picture.ndim == 3 and len(picture) == 3:
        picture = picture.permute(1, 2, 0)
    elif picture.ndim == 3:
        picture = picture[0]
    return picture.double().clamp(0, 1).numpy(force=True)
