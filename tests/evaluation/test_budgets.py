"""Attacks with another budget than the evaluation's: what they find outside does not count, and the report says so."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor

from fastadv_adapters import Report, SafePGD
from fastadv_adapters.evaluation import Row
from fastadv_adapters.evaluation.running import _half_units, _within
from tests.evaluation.runs import EPS, data, evaluated, lines, net


def shifted(x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """Far enough to be another class for some."""
    return (x + eps).clamp(0, 1)


def pgd(eps: float) -> Any:
    return torchattacks.PGD(net(), eps=eps, alpha=eps, steps=3)


def test_images_outside_of_eps_do_not_count_and_are_told_apart(tmp_path: Path) -> None:
    report = evaluated(attacks=[pgd(16 * EPS), "safe-pgd-4"], output=tmp_path)
    attacked = round(report.clean_accuracy * len(report.samples))
    assert report.by_attack["PGD"] == report.clean_accuracy > report.robust_accuracy
    assert report.outside == {"PGD": attacked}
    assert report.denied == 0, "nothing that lies outside is a claim that the plain model denies"
    assert all(row.outside == (() if row.broken_by == "clean" else ("PGD",)) for row in report.samples)
    own, outside = report.notes
    assert own.startswith(
        f"the attack PGD has eps 0.128 of its own, and the evaluation eps {EPS}: what it finds beyond"
    )
    assert outside.startswith(f"{attacked} images of the attack PGD are not within eps and bounds of the evaluation")
    assert "make the attack with the same eps" in outside
    assert f"note: {outside}" in str(report)
    report.to_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["outside"] == {"PGD": attacked}
    assert [row["outside"] for row in written["samples"]] == [list(row.outside) for row in report.samples]
    assert Report.load(tmp_path).samples == report.samples


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf)])
def test_images_outside_of_eps_or_bounds_do_not_count_if_bounds_have_no_end(bounds: tuple[float, float]) -> None:
    report = evaluated(attacks=pgd(16 * EPS), bounds=bounds)
    attacked = round(report.clean_accuracy * len(report.samples))
    assert report.outside == {"PGD": attacked}
    assert len(report.notes) == 2, "of the budget, and of images outside of it"
    x = torch.zeros(1, 3, 8, 8)
    setting: Any = SimpleNamespace(norm="linf", bounds=bounds)
    assert _within(x - EPS, x, EPS, setting).item() is (bounds[0] < 0)


def test_steps_in_other_units_are_told() -> None:
    given: dict[str, Any] = {"eps": EPS, "steps": 2, "random_start": False}
    (note,) = evaluated(attacks=SafePGD(net(), alpha=EPS / 255, **given)).notes
    assert note.startswith("SafePGD: steps of alpha")
    assert evaluated(attacks=SafePGD(net(), alpha=EPS, **given)).notes == []


def test_the_same_budget_is_nothing_to_be_told() -> None:
    report = evaluated(attacks=[pgd(EPS), foolbox.attacks.LinfPGD(steps=2), partial(shifted, eps=EPS)])
    assert report.outside == {}
    assert report.by_attack["PGD"] < report.clean_accuracy
    assert not [note for note in report.notes if "eps" in note]


def test_an_attack_that_is_weaker_than_the_budget_is_told() -> None:
    report = evaluated(attacks=[pgd(EPS / 2), partial(shifted, eps=EPS / 4)])
    assert report.outside == {}
    first, second = report.notes
    assert first.startswith(
        f"the attack PGD has eps {EPS / 2:g} of its own, and the evaluation eps {EPS:g}: it is weaker"
    )
    assert second.startswith(f"the attack partial has eps {EPS / 4:g} of its own")
    assert f"shifted(eps={EPS / 4:g})" in report.quote


def test_of_several_budgets_each_that_differs_is_told_and_images_are_counted_together() -> None:
    report = evaluated(attacks=pgd(EPS), eps=[EPS / 4, EPS / 2, EPS, 2 * EPS])
    attacked = round(report.clean_accuracy * len(report.samples))
    assert report.outside == {"PGD": 2 * attacked}
    assert sum(row.outside == ("PGD", "PGD") for row in report.samples) == attacked
    assert [note.partition(": ")[0].rpartition("eps ")[2] for note in report.notes[:2]] == ["0.016", "0.002, 0.004"]


@pytest.mark.parametrize("attack", [torchattacks.PGDL2(net(), steps=2), foolbox.attacks.L2PGD(steps=2)])
def test_a_budget_in_another_norm_is_told(attack: Any) -> None:
    report = evaluated(attacks=attack)
    assert report.notes[0].startswith(f"the attack {type(attack).__name__} measures in l2, and the evaluation in linf")
    assert evaluated(attacks=attack, norm="l2", eps=1.0).outside == {}


def ascended(model: Any, x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Its default value is that of an optimiser."""
    return x.clone()


class ThirdL2(torchattacks.attack.Attack):  # type: ignore[misc]
    """An attack of the user's own, which does not say its norm where it is looked for."""

    def __init__(self) -> None:
        super().__init__("ThirdL2", net())
        self.eps = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The images themselves."""
        return x.clone()


def test_a_budget_that_may_be_in_other_units_is_not_doubted() -> None:
    x, y = data()
    inner, mean, std = net(), 0.3, 0.25
    model = torch.nn.Sequential(Unscaled(mean, std), inner)
    attack = torchattacks.PGD(model, eps=EPS, alpha=EPS, steps=3)
    attack.set_normalization_used([mean], [std])
    bounds = ((0 - mean) / std, (1 - mean) / std)
    report = evaluated(((x - mean) / std, y), attack, model=model, eps=EPS / std, bounds=bounds)
    assert report.outside == {}
    assert report.robust_accuracy < report.clean_accuracy
    assert not [note for note in report.notes if "eps" in note]
    assert not [note for note in evaluated(attacks=ThirdL2(), norm="l2", eps=1.0).notes if "measures eps" in note]


def test_the_default_value_of_a_callable_is_no_budget() -> None:
    report = evaluated(attacks=ascended)
    assert not [note for note in report.notes if "of its own" in note]
    assert "ascended(eps=1e-08)" in report.quote


class Unscaled(torch.nn.Module):
    """Takes normalised images, and gives those in [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        """Back to [0, 1]."""
        return x * self.std + self.mean


def test_rows_of_before_are_read() -> None:
    values = evaluated(data(2)).samples[0].as_dict()
    del values["outside"]
    assert Row.of(values).outside == ()


@pytest.mark.parametrize("kind", [torchattacks.PGD, foolbox.attacks.LinfDeepFoolAttack])
def test_a_class_in_the_place_of_an_attack_is_an_error(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"expected an attack object in attacks, got the class {kind.__name__}: make"):
        evaluated(attacks=["safe-pgd-2", kind], output=tmp_path)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_half_precision_rounds_is_within_eps(dtype: torch.dtype) -> None:
    x, y = data()
    given: Any = {"model": copy.deepcopy(net()).to(dtype), "eps": 0.15}
    report = evaluated((x.to(dtype), y), [partial(shifted, eps=0.15)], **given)
    assert report.outside == {}
    assert report.robust_accuracy < report.clean_accuracy
    farther = evaluated((x.to(dtype), y), [partial(shifted, eps=0.17)], **given)
    assert farther.outside
    assert farther.robust_accuracy == farther.clean_accuracy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchattacks_in_half_precision_is_within_eps(dtype: torch.dtype) -> None:
    """Its eps is rounded to the dtype of the images: 8 / 255 is larger in bfloat16."""
    (x, y), model = data(), copy.deepcopy(net()).to(dtype)
    attack = torchattacks.PGD(model, eps=8 / 255, alpha=8 / 255, steps=3)
    report = evaluated((x.to(dtype), y), attack, model=model, eps=8 / 255, options={"dtype": dtype})
    assert report.outside == {}
    assert report.robust_accuracy < report.clean_accuracy


@pytest.mark.parametrize(("length", "norm"), [(0.661, "l2"), (0.5, "l2"), (30.0, "l1"), (20.0, "l1")])
def test_images_beyond_what_rounding_explains_do_not_count(length: float, norm: Any) -> None:
    """An attack of this length in float32, whose images are then rounded to bfloat16."""
    dtype, eps = torch.bfloat16, 0.5 if norm == "l2" else 20.0
    x, change = torch.rand(16, 3, 32, 32).mul(0.4).add(0.55).to(dtype), torch.randn(16, 3, 32, 32).sign()
    change *= length / torch.linalg.vector_norm(change.flatten(1), int(norm[1]), 1).view(-1, 1, 1, 1)
    found = (x.float() + change).to(dtype)
    inside = _within(found, x, eps, SimpleNamespace(norm=norm, bounds=(-1.0, 2.0)))  # type: ignore[arg-type]
    assert inside.tolist() == 16 * [length <= eps]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_half_a_unit_at_most(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float32 else torch.float32  # float16 is rounded by way of it
    exact = torch.cat([torch.rand(10_000, dtype=wide), 2.0 ** torch.arange(-20, 3)])
    moved, allowed = (exact.double() - exact.to(dtype).double()).abs(), _half_units(exact.to(dtype)).double()
    assert (moved <= allowed).all()
    assert (allowed[:10_000] <= 2.01 * moved[:10_000].max()).all()
    assert _half_units(torch.ones(1, dtype=dtype)).item() == torch.finfo(dtype).eps / 2
