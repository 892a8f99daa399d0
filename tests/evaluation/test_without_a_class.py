"""Logits that are NaN or infinite make no sample robust; -inf leaves a class out, and the others decide."""

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, Report, SafePGD, compare
from fastadv_adapters.attack import undecided
from tests.evaluation.runs import EPS, data, evaluated, net

LOST = "logits of 32 samples are NaN or infinite: these count as wrong"


class Replaces(nn.Module):
    """Has another value in the place of one logit, or of all."""

    def __init__(self, value: float, where: slice) -> None:
        super().__init__()
        self.net, self.value, self.where = net(), value, where

    def forward(self, x: Tensor) -> Tensor:
        places = torch.zeros(10, dtype=torch.bool)
        places[self.where] = True
        logits: Tensor = self.net(x).masked_fill(places, self.value)
        return logits


def run(model: nn.Module, attack: Any) -> Report:
    return evaluated(model=FastAttackModel(model, dtype=torch.float32), attacks=[attack])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_samples_without_a_class_count_as_wrong(value: float, where: slice) -> None:
    model = Replaces(value, where).eval()
    report = run(model, "safe-pgd-2")
    assert report.clean_accuracy == report.robust_accuracy == 0
    assert {(row.clean, row.prediction) for row in report.samples} == {(-1, -1)}
    assert LOST in report.notes
    x, y = data()
    found = compare(model, x, y, repeats=1, progress=False)
    assert [row.robust_accuracy for row in found.rows] == [0.0] * len(found.rows)
    assert LOST in found.notes


class LostNearby(nn.Module):
    """Gives NaN to all images but the clean ones."""

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("known", data()[0])

    def forward(self, x: Tensor) -> Tensor:
        known = (x[:, None] == self.known).flatten(2).all(2).any(1)
        logits: Tensor = self.net(x)
        return logits.where(known[:, None], torch.nan)


def test_an_image_that_an_attack_takes_to_nan_is_broken() -> None:
    report = run(LostNearby().eval(), lambda model, x, y: (x + EPS / 2).clamp(0, 1))
    assert report.clean_accuracy > 0
    assert report.robust_accuracy == 0
    assert all(row.prediction == -1 for row in report.samples if row.broken_by != "clean")


@pytest.mark.parametrize("attack", ["safe-pgd-6", "safe-pgd-ce-6", "safe-pgd-targeted-3", "PGD"])
def test_a_class_that_is_left_out_is_no_shield(attack: str) -> None:
    model = Replaces(-torch.inf, slice(3, 4)).eval()
    with torch.no_grad():
        right = (model(data()[0]).argmax(1) == data()[1]).float().mean()
    given = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=6) if attack == "PGD" else attack
    report = run(model, given)
    assert report.clean_accuracy == pytest.approx(float(right))
    assert report.robust_accuracy < report.clean_accuracy - 0.2
    assert report.denied == 0
    assert not report.random
    assert not [note for note in report.notes if "NaN" in note]


@pytest.mark.parametrize("loss", ["auto", "ce", "margin", "dlr"])
def test_every_loss_of_safe_pgd_bears_a_class_that_is_left_out(loss: Any) -> None:
    model, x = Replaces(-torch.inf, slice(3, 4)).eval(), data()[0]
    y = model(x).argmax(1)
    attack = SafePGD(FastAttackModel(model, dtype=torch.float32), eps=EPS, steps=6, loss=loss)
    assert (model(attack(x, y)).argmax(1) != y).float().mean() > 0.2


def test_who_has_no_class() -> None:
    rows = [[1, 2, 3], [1, torch.nan, 3], [1, torch.inf, 3], [1, -torch.inf, 3], [-torch.inf] * 3]
    assert undecided(torch.tensor(rows)).tolist() == [False, True, True, False, True]
