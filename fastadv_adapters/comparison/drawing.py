"""A comparison as a picture: speed with spread, and the cosines of the gradients. Readable without colours."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..modules import need
from .row import Row
from .writing import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that colour-blind people can tell apart (Okabe and Ito, https://jfly.uni-koeln.de/color/), of bars and of
# lines; in black and white the hatch of a bar and the dashes of a line do it.
STYLES = (
    ("#d9d9d9", "#202020", "", "-"),
    ("#56b4e9", "#0072b2", "\\\\", "--"),
    ("#e69f00", "#d55e00", "///", "-."),
    ("#009e73", "#005c43", "...", ":"),
    ("#cc79a7", "#7d3a60", "xx", (0, (5, 1, 1, 1, 1, 1))),
)
INK = "#202020"


def draw(rows: Sequence[Row], recommended: str, title: str, path: str | os.PathLike[str]) -> None:
    """Draw bars of the speed and a histogram of the cosines, and write the picture."""
    need("matplotlib", extra="evaluate")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ran = [row for row in rows if row.failure is None]
    with rc_context({"font.size": 10, "hatch.linewidth": 0.8, "text.color": INK, "axes.edgecolor": INK}):
        figure = Figure(figsize=(10, 1.6 + 0.62 * max(len(ran), 3)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _speed(left, ran, recommended)
        _cosines(right, ran)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        write_picture(path, figure)


def _speed(axes: "Axes", rows: Sequence[Row], recommended: str) -> None:
    for place, row in enumerate(rows):
        face, _, hatch, _ = STYLES[place % len(STYLES)]
        lower, upper = row.spread
        axes.barh(place, row.ratio, height=0.66, color=face, hatch=hatch, edgecolor=INK, linewidth=0.8)
        spread: Any = [[row.ratio - lower], [upper - row.ratio]]
        axes.errorbar(row.ratio, place, xerr=spread, color="black", capsize=4, linewidth=1.4)
        word = f"{row.ratio:.2f}" + ("" if row.faithful else "  NOT FAITHFUL")
        axes.annotate(word, (upper, place), (7, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    names = [f"{row.name}\n{row.runs_in}" + ("\n(recommended)" if row.name == recommended else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * max([1.0, *(row.spread[1] for row in rows)]))
    axes.set_xlabel("times as fast as the plain model (median, quartiles)")
    axes.spines[["top", "right"]].set_visible(False)


def _cosines(axes: "Axes", rows: Sequence[Row]) -> None:
    # As 1 minus the cosine, on a logarithmic scale: what matters lies between 1 - 1e-7 and 1 - 1e-1.
    edges = [10.0 ** (power / 2) for power in range(-28, 2)]
    for place, row in enumerate(rows):
        face, edge, _, dashes = STYLES[place % len(STYLES)]
        far = [min(max(1 - (c if c == c else 0.0), edges[0]), 2.0) for c in row.cosines]
        ink: Any = {"edgecolor": edge, "linestyle": dashes, "linewidth": 2.0}
        axes.hist(
            far, bins=edges, histtype="stepfilled" if place == 0 else "step", facecolor=face, label=row.name, **ink
        )
    axes.set_xscale("log")
    axes.set_xlabel("1 - cosine of the gradient with float64")
    axes.set_ylabel("samples")
    counts: Any = axes.yaxis.get_major_locator()
    counts.set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
