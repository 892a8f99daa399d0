"""AutoAttack's attacks in an evaluation: images of any floating dtype, and what they cannot take."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadv_adapters import evaluate
from tests.evaluation.runs import EPS, data, evaluated, net

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Square, which would take thousands."""
    from pyautoattack.fab_base import FABAttack
    from pyautoattack.square import SquareAttack

    for kind, name, value in ((SquareAttack, "n_queries", 20), (FABAttack, "n_iter", 5)):
        original = kind.perturb

        def few(self: Any, *args: Any, original: Any = original, name: str = name, value: int = value) -> Any:
            setattr(self, name, value)
            return original(self, *args)

        monkeypatch.setattr(kind, "perturb", few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["apgd-ce", "fab-t", "square"])
def test_images_of_any_dtype_are_attacked(name: str, dtype: torch.dtype) -> None:
    x, y = data(8)
    model, images = copy.deepcopy(net()).to(dtype), x.to(dtype)
    report = evaluate(model, (images, y), name, eps=4 * EPS, progress=False)
    assert report.outside == {}
    assert report.robust_accuracy < report.clean_accuracy
    assert {found.dtype for found in report.adversarials().values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_images_of_another_dtype_than_the_model(dtype: torch.dtype) -> None:
    x, y = data(8)
    report = evaluate(net(), (x.to(dtype), y), ["fab", "square"], eps=4 * EPS, norm="l1", progress=False)
    assert report.outside == {}


@pytest.mark.parametrize("name", ["standard", "square"])
def test_data_without_channels_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    given: Any = torch.rand(6, 12), torch.arange(6) % 4
    with pytest.raises(ValueError, match=r"expected images of shape \(C, H, W\) for square of AutoAttack, got \(12,\)"):
        evaluated(given, name, model=model, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
