"""Attacks of libraries that are not installed here, by the names of their modules and classes."""

from typing import Any

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackModel

ATTACKS = {
    "art.attacks.evasion.deepfool": "class DeepFool: ",
    "art.attacks.evasion.elastic_net": "class ElasticNet: ",
    "art.attacks.evasion.carlini": "class CarliniL2Method: ",
    "deeprobust.image.attack.deepfool": "class DeepFool: ",
    "secmlt.adv.evasion.fmn": (
        "class ModularEvasionAttackMinDistance: ...\nclass FMNNative(ModularEvasionAttackMinDistance): "
    ),
    "cleverhans.torch.attacks.carlini_wagner_l2": "",
    "cleverhans.torch.attacks.projected_gradient_descent": "",
    "secmlt.adv.evasion.pgd": "class PGDNative: ",
    "someone.attacks": "class DeepFool: ",
}
FIXED_BUDGET = ("projected_gradient_descent", "pgd", "someone.attacks")


def asking(module: str, head: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model hands out in a gradient pass to code of this module."""
    names: dict[str, Any] = {"__name__": module}
    exec(f"{head}\n  def run(self, model, x): return model(x)" if head else "def run(model, x): return model(x)", names)
    own = [value for value in names.values() if isinstance(value, type)]
    found: torch.Tensor = own[-1]().run(model, x) if own else names["run"](model, x)
    return found.detach()


@pytest.mark.parametrize("module", ATTACKS)
def test_attacks_that_read_decisions_get_those_of_the_plain_model(module: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.Tanh(), nn.Linear(32, 5))
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    fast = FastAttackModel(model.eval(), dtype=torch.bfloat16)
    is_exact = torch.equal(asking(module, ATTACKS[module], fast, x), model(x).detach())
    assert is_exact != module.endswith(FIXED_BUDGET)


WALKS = {
    "apply": "model.apply(found.append)",
    "modules": "found += model.modules()",
    "named modules": "found += [part for _, part in model.named_modules()]",
    "children": "found += [part for child in model.children() for part in (child, *child.children())]",
}


def walk(library: str, how: str, model: nn.Module) -> list[nn.Module]:
    """The parts of a model that code of this library finds."""
    names: dict[str, Any] = {"__name__": f"{library}.core", "model": model, "found": []}
    exec(f"list(model.parameters())\n{WALKS[how]}", names)
    found: list[nn.Module] = names["found"]
    return found


@pytest.mark.parametrize("how", WALKS)
@pytest.mark.parametrize("library", ["captum", "shap", "zennit"])
def test_libraries_that_change_layers_are_told_that_they_find_none(library: str, how: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU()).eval()
    fast = FastAttackModel(model)
    assert model[1] in walk(library, how, model)
    for shell in (fast, nn.Sequential(fast)):
        with pytest.raises(TypeError, match=f"which {library} does here, got a FastAttackModel, which shows none"):
            walk(library, how, shell)
        assert fast in walk("someone", how, nn.Sequential(shell))
    fast(torch.rand(2, 3, 4, 4, requires_grad=True)).sum().backward()
