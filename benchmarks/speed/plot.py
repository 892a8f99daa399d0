"""The picture of the results: how many times faster than plain each way is, network by network."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.correctness import WRONG
from benchmarks.shared.rows import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS, INK, FAINT = "#0b7a75", "#b4bcc4", "#22303c", "#8593a0"
WRONG_FACE, ALARM = "#f9e3de", "#c8442c"


def draw(networks: Mapping[str, Any], judged: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw horizontal bars, one per way, one panel per network; ways that are wrong are hatched.

    Args:
        networks: records of the networks, as JSON has them.
        judged: records of the ways on the digits network, likewise.
        path: of the PNG.
        title: above it all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {key: _bars(record) for key, record in networks.items()}
    heights = [len(bars) + 2.6 for bars in panels.values()]
    with plt.rc_context({"font.size": 9, "hatch.linewidth": 1.2, "axes.edgecolor": FAINT, "text.color": INK}):
        figure, grid = plt.subplots(
            len(panels),
            1,
            figsize=(8.2, 0.24 * sum(heights) + 0.9),
            height_ratios=heights,
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for axes, (key, bars) in zip(grid[:, 0], panels.items(), strict=True):
            _panel(axes, bars, judged)
            axes.set_title(networks[key]["title"], loc="left", fontsize=10, fontweight="bold", color=INK)
        grid[-1, 0].set_xlabel("images x steps per second, relative to plain torchattacks", color=INK)
        largest = max([1.0, *(row["ratio_to_plain"] for bars in panels.values() for row in bars.values())])
        grid[-1, 0].set_xlim(0, 1.15 * largest)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
        _legend(figure)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _bars(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The ways that were timed, the fastest first."""
    timed = {key: row for key, row in record["rows"].items() if row.get("ratio_to_plain")}
    return dict(sorted(timed.items(), key=lambda item: -item[1]["ratio_to_plain"]))


def _panel(axes: "Axes", bars: Mapping[str, Mapping[str, Any]], judged: Mapping[str, Any]) -> None:
    places = range(len(bars))
    for place, (key, row) in zip(places, bars.items(), strict=True):
        wrong = judged.get(key, {}).get("verdict") == WRONG
        own = OURS if row["ours"] else INK if key == PLAIN else OTHERS
        style: dict[str, Any] = {"color": WRONG_FACE, "edgecolor": ALARM, "hatch": "////"} if wrong else {"color": own}
        axes.barh(place, row["ratio_to_plain"], height=0.74, linewidth=0.8, **style)
        word = f"{row['ratio_to_plain']:.2f}x{'  WRONG' if wrong else ''}"
        told = axes.annotate(word, (row["ratio_to_plain"], place), (4, 0), textcoords="offset points", va="center")
        told.set(color=ALARM if wrong else INK, fontsize=8)
        told.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    axes.set_yticks(places, [row["label"] for row in bars.values()])
    axes.tick_params(axis="both", length=0, colors=INK, labelbottom=True)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.xaxis.grid(True, color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=OURS, label="ours"),
        Patch(color=OTHERS, label="others"),
        Patch(color=INK, label="plain torchattacks"),
        Patch(facecolor=WRONG_FACE, edgecolor=ALARM, hatch="////", label="fast but wrong"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
