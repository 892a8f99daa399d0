"""Pictures say what they show: texts in them are read from SVG."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from torch import Tensor

from fastadv_adapters.evaluation import pictures
from fastadv_adapters.evaluation.pictures import _edges
from tests.evaluation.runs import EPS, data, evaluated


def unchanged(x: Tensor, y: Tensor) -> Tensor:
    return x


def texts_in(draw: Callable[[Path], None], path: Path) -> list[str]:
    """The texts of a picture."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(path)
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def test_each_row_of_triples_says_what_became_of_the_sample(tmp_path: Path) -> None:
    report = evaluated(eps=[EPS / 2, EPS])
    broken = [row for row in report.samples if row.broken_by not in (None, "clean")][:3]
    texts = texts_in(lambda path: report.triples(path, 3), tmp_path / "triples.svg")
    assert {"clean", "perturbation", "adversarial"} <= set(texts)
    for row in broken:
        assert f"sample {row.index}" in texts
        assert f"class {row.label}, seen as {row.prediction}" in texts
        assert f"broken by {row.broken_by}" in texts
        assert f"within eps {row.eps:.4g}" in texts


def test_images_are_seen_though_bounds_have_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Tensor]()
    original = pictures._as_image

    def watched(image: Tensor) -> Any:
        seen.append(image)
        return original(image)

    monkeypatch.setattr(pictures, "_as_image", watched)
    evaluated(bounds=(0, math.inf)).triples(tmp_path / "triples.svg", 3)
    assert min(float(image.min()) for image in seen) == 0
    assert max(float(image.max()) for image in seen) == 1


def test_counts_are_drawn_at_whole_numbers(tmp_path: Path) -> None:
    report = evaluated(data(3), ["safe-pgd-2"], eps=EPS / 100)
    texts = texts_in(report.plot, tmp_path / "plot.svg")
    shares = {f"{100 * share:.1f}" for share in report.by_attack.values()}
    assert [text for text in texts if re.fullmatch(r"[\d.]+", text) and "." in text and text not in shares] == []
    uncounted = evaluated(data(3), unchanged, eps=EPS)
    assert "none were counted" in texts_in(uncounted.plot, tmp_path / "uncounted.svg")


@pytest.mark.parametrize(("passes", "bars"), [([6], 1), ([1, 24], 24), ([1, 25], 13), ([2.5, 900], 24)])
def test_each_bar_stands_for_as_many_whole_numbers(passes: list[float], bars: int) -> None:
    edges = _edges(passes)
    assert len(edges) == bars + 1
    assert edges[0] < min(passes) <= max(passes) < edges[-1]
    widths = {after - before for before, after in pairwise(edges)}
    assert len(widths) == 1
    assert widths.pop().is_integer()
    assert all((edge - 0.5).is_integer() for edge in edges)
