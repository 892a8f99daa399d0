"""adv-lib's attacks are functions: those that minimise a perturbation get exact decisions by default."""

import importlib
import sys
import warnings
from collections.abc import Callable
from math import inf
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.adapters.test_default_decisions import Spy
from tests.support.tools import attackable_net, batch

pytest.importorskip("adv_lib")
pytestmark = pytest.mark.usefixtures("untouched")
Run = Callable[[Any, nn.Module, Tensor, Tensor], Tensor]

MINIMAL: dict[str, Run] = {
    "alma": lambda a, m, x, y: a.alma(m, x, y, num_steps=2),
    "carlini_wagner_l2": lambda a, m, x, y: a.carlini_wagner_l2(m, x, y, binary_search_steps=1, max_iterations=10),
    "carlini_wagner_linf": lambda a, m, x, y: a.carlini_wagner_linf(m, x, y, max_iterations=2),
    "ddn": lambda a, m, x, y: a.ddn(m, x, y, steps=2),
    "df": lambda a, m, x, y: a.df(m, x, y, steps=2),
    "fab": lambda a, m, x, y: a.fab(m, x, y, norm=2, n_iter=2),
    "fga": lambda a, m, x, y: a.fga(m, x, y, False, max_iter=2),
    "fmn": lambda a, m, x, y: a.fmn(m, x, y, norm=2, steps=2),
    "pdgd": lambda a, m, x, y: a.pdgd(m, x, y, num_steps=2),
    "pdpgd": lambda a, m, x, y: a.pdpgd(m, x, y, norm=2, num_steps=2),
    "perc_al": lambda a, m, x, y: a.perc_al(m, x, y, 10, max_iterations=2),
    "sdf": lambda a, m, x, y: a.sdf(m, x, y, steps=2),
    "sigma_zero": lambda a, m, x, y: a.sigma_zero(m, x, y, num_steps=2),
    "str_attack": lambda a, m, x, y: a.str_attack(m, x, y, binary_search_steps=1, max_iterations=2, retrain=False),
    "tr": lambda a, m, x, y: a.tr(m, x, y, iter=2),
    "vfga": lambda a, m, x, y: a.vfga(m, x, y, False, max_iter=2),
}
FIXED: dict[str, Run] = {
    "apgd": lambda a, m, x, y: a.apgd(m, x, y, eps=0.01, norm=inf, n_iter=2),
    "pgd_linf": lambda a, m, x, y: a.pgd_linf(m, x, y, 0.01, steps=2),
}


@pytest.fixture(scope="module")
def attacks() -> Any:
    """adv-lib's attacks; stand-ins take the place of what it imports and they do not need, if that is missing."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("visdom", "torchvision"):
            try:
                importlib.import_module(name)
            except Exception:
                stand_in: Any = ModuleType(name)
                stand_in.models = stand_in.Visdom = SimpleNamespace()
                patch.setitem(sys.modules, name, stand_in)
        return importlib.import_module("adv_lib.attacks")


@pytest.mark.parametrize("name", [*MINIMAL, *FIXED])
def test_attacks_that_minimise_get_exact_decisions_and_others_fast_ones(name: str, attacks: Any) -> None:
    spy = Spy()
    {**MINIMAL, **FIXED}[name](attacks, spy.fast, spy.x, spy.y)
    assert spy.verdict() == ("exact" if name in MINIMAL else "fast")


def test_every_attack_of_the_library_is_in_one_of_the_tables(attacks: Any) -> None:
    functions = {name for name, value in vars(attacks).items() if callable(value)}
    assert functions - {*MINIMAL, *FIXED} == {"apgd_targeted"}


@pytest.mark.parametrize("name", ["ddn", "fab"])
def test_distances_are_those_on_the_plain_model(name: str, attacks: Any) -> None:
    net, (x, _) = attackable_net(), batch(12)
    y = net(x).argmax(1)
    run: dict[str, Callable[[nn.Module], Tensor]] = {
        "ddn": lambda m: attacks.ddn(m, x, y, steps=40, levels=None),
        "fab": lambda m: attacks.fab(m, x, y, norm=2, n_iter=10),
    }
    plain, fast = (run[name](model) for model in (net, FastAttackModel(net, dtype=torch.bfloat16)))
    assert bool((net(fast).argmax(1) != y).all())
    distances = [(found - x).flatten(1).norm(dim=1).median() for found in (plain, fast)]
    assert float(distances[1]) <= 1.05 * float(distances[0])
