"""Pictures of a report, readable in black and white."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..modules import need
from .rows import CLEAN, Row

DARK, LIGHT = "#264653", "#a8b8c0"


def draw_report(
    by_attack: dict[str, float], curve: dict[float, float], rows: Sequence[Row], path: str | os.PathLike[str]
) -> None:
    """Draw accuracy attack by attack, passes per sample, and robust accuracy by budget if there are several."""
    panels = 3 if len(curve) > 1 else 2
    figure, axes = _figure(panels, height=3.2)
    _draw_attacks(axes[0], by_attack)
    _draw_passes(axes[1], rows)
    if len(curve) > 1:
        _draw_curve(axes[2], curve)
    figure.savefig(path, dpi=150)


def draw_triples(
    shown: Sequence[tuple[Row, Tensor, Tensor]], bounds: tuple[float, ...], path: str | os.PathLike[str]
) -> None:
    """Draw clean image, perturbation and adversarial, a column each, with the class that the model gives them.

    Values between the bounds go from black to white. In a perturbation grey is none, and its largest change is black
    or white.

    Raises:
        ValueError: what is shown are no images.
    """
    if any(clean.ndim not in (2, 3) for _, clean, _ in shown):
        raise ValueError(
            f"expected images of shape (C, H, W) or (H, W), got {tuple(shown[0][1].shape)}: draw others yourself, from "
            f"adversarials()"
        )
    figure, axes = _figure(len(shown), height=4.4, rows=3)
    for column, (row, clean, adversarial) in enumerate(shown):
        change = (adversarial.double() - clean.double()).numpy(force=True)
        largest = abs(change).max() or 1.0
        lower, upper = bounds
        seen = [(image.double() - lower) / (upper - lower) for image in (clean, adversarial)]
        pictures = (seen[0], (adversarial.double() - clean.double()) / (2 * largest) + 0.5, seen[1])
        titles = (f"class {row.clean}", f"at most {largest:.3g}", f"class {row.prediction}")
        for place, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            axis = axes[place][column]
            axis.imshow(_as_image(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(("clean", "perturbation", "adversarial")[place], fontsize=8)
    figure.savefig(path, dpi=150)


def _figure(columns: int, *, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure that belongs to no window and to no list of open ones."""
    figure = need("matplotlib.figure", extra="evaluate").Figure(
        figsize=((4.0 if rows == 1 else 1.3) * max(columns, 3 if rows > 1 else 1), height), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0] if rows == 1 else axes


def _draw_attacks(axis: Any, by_attack: dict[str, float]) -> None:
    names = list(by_attack)
    values = [100 * by_attack[name] for name in names]
    colours = [LIGHT if name == CLEAN else DARK for name in names]
    bars = axis.barh(range(len(names)), values, color=colours, edgecolor="black", linewidth=0.6)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 115), xlabel="accuracy in %", title="after each attack")


def _draw_passes(axis: Any, rows: Sequence[Row]) -> None:
    attacked = [row for row in rows if row.broken_by != CLEAN]
    groups = {"broken": [], "standing": []}  # type: dict[str, list[float]]
    for row in attacked:
        if row.forward is not None and row.backward is not None:
            groups["standing" if row.broken_by is None else "broken"].append(row.forward + row.backward)
    values = [groups["broken"], groups["standing"]]
    if any(values):
        axis.hist(
            values, bins=24, stacked=True, color=[LIGHT, DARK], edgecolor="black", linewidth=0.5, label=list(groups)
        )
        axis.legend(fontsize=8)
    axis.set(xlabel="forward and backward passes", ylabel="samples", title="passes per sample")


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
