"""While an attack runs that reads decisions off gradient passes, those are exact by default, and fast for others."""

import threading
from collections.abc import Callable
from typing import Any

import eagerpy as ep
import foolbox as fb
import pyautoattack
import pytest
import torch
import torchattacks
from foolbox.attacks import base
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel, SafeLinfPGD
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")
A = fb.attacks


class Spy:
    """Whose values the gradient passes of a fast model return."""

    def __init__(self, **options: Any) -> None:
        self.net, (self.x, _) = attackable_net(), batch(4)
        self.y = self.net(self.x).argmax(1)
        self.fast = FastAttackModel(self.net, dtype=torch.bfloat16, **options)
        self.seen: list[bool] = []
        self.fast.register_forward_hook(self.look)

    def look(self, model: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        if logits.requires_grad:
            with torch.no_grad():
                self.seen.append(torch.allclose(logits.float(), self.net(inputs[0].detach()), rtol=1e-4, atol=1e-4))

    def verdict(self) -> str:
        assert self.seen, "the test needs gradient passes"
        return "exact" if all(self.seen) else "mixed" if any(self.seen) else "fast"


class OwnLoop(base.MinimizationAttack):
    """An attack as users write them: all of it is their own but ``__call__``."""

    distance = fb.distances.l2

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: Any = None, **kwargs: Any) -> Any:
        x, restore = ep.astensor_(inputs)
        for _ in range(2):
            _, gradient = ep.value_and_grad(lambda z: model(z).sum(), x)
            x = (x + 0.01 * gradient.sign()).clip(0, 1)
        return restore(x)


class Stand:
    """In the place of a solver that takes a minute to compile."""

    def solve(self, x0: Any, x: Any, *others: Any) -> Any:
        return 0 * x


def brendel_bethge(kind: Any) -> Callable[[Any], Any]:
    """The attack from starting points, with a stand-in for its solver."""

    def call(spy: Spy, model: Any) -> None:
        attack = type(kind.__name__, (kind,), {"instantiate_optimizer": lambda self: Stand()})(steps=2)
        others = torch.stack([spy.x[spy.y != label][0] for label in spy.y])
        attack(model, spy.x, spy.y, epsilons=None, starting_points=others)

    return call  # type: ignore[return-value]


def on(attack: Any, epsilons: float | None = None) -> Any:
    return lambda spy, model: attack(model, spy.x, spy.y, epsilons=epsilons)


def scaled(attack: Any) -> Any:
    return lambda spy, model: attack(model.transform_bounds((0, 4), wrapper=True), 4 * spy.x, spy.y, epsilons=None)


def averaged(attack: Any) -> Any:
    def call(spy: Spy, model: Any) -> None:
        attack(fb.models.ExpectationOverTransformationWrapper(model, 2), spy.x, spy.y, epsilons=None)

    return call


def in_a_thread(call: Any) -> Any:
    def begin(spy: Spy, model: Any) -> None:
        thread = threading.Thread(target=call, args=(spy, model))
        thread.start()
        thread.join()

    return begin


def run_alone(spy: Spy, model: Any) -> None:
    A.DDNAttack(steps=2).run(model, spy.x, fb.criteria.Misclassification(spy.y))


FOOLBOX: dict[str, Any] = {
    "DDN": on(A.DDNAttack(steps=2)),
    "L2DeepFool": on(A.L2DeepFoolAttack(steps=2)),
    "LinfDeepFool": on(A.LinfDeepFoolAttack(steps=2)),
    "C&W": on(A.L2CarliniWagnerAttack(binary_search_steps=1, steps=2)),
    "EAD": on(A.EADAttack(binary_search_steps=1, steps=2)),
    "NewtonFool": on(A.NewtonFoolAttack(steps=2)),
    "L0FMN": on(A.L0FMNAttack(steps=2)),
    "L1FMN": on(A.L1FMNAttack(steps=2)),
    "L2FMN": on(A.L2FMNAttack(steps=2)),
    "LInfFMN": on(A.LInfFMNAttack(steps=2)),
    "VAT": on(A.VirtualAdversarialAttack(steps=1), 0.1),
    "own": on(OwnLoop()),
    "with a budget": on(A.L2DeepFoolAttack(steps=2), 0.1),
    "repeated": on(A.DDNAttack(steps=2).repeat(2)),
    "begun by another": on(A.L2FMNAttack(steps=1, init_attack=A.L2DeepFoolAttack(steps=20))),
    "begun without gradient": on(A.L2FMNAttack(steps=1, init_attack=A.LinearSearchBlendedUniformNoiseAttack(steps=2))),
    "other bounds": scaled(A.DDNAttack(steps=2)),
    "averaged": averaged(A.DDNAttack(steps=2)),
    "in a thread": in_a_thread(on(A.DDNAttack(steps=2))),
    "run alone": run_alone,
    **{
        kind.__name__: brendel_bethge(kind)
        for kind in (
            A.L0BrendelBethgeAttack,
            A.L1BrendelBethgeAttack,
            A.L2BrendelBethgeAttack,
            A.LinfinityBrendelBethgeAttack,
        )
    },
}
FIXED: dict[str, Any] = {
    "PGD": on(A.LinfPGD(steps=2), 0.1),
    "L2PGD": on(A.L2PGD(steps=2), 0.1),
    "FGSM": on(A.FGSM(), 0.1),
    "MIFGSM": on(A.L2MomentumIterativeFastGradientMethod(steps=2), 0.1),
    "repeated": on(A.LinfPGD(steps=2).repeat(2), 0.1),
    "safe": on(SafeLinfPGD(steps=2), 0.1),
}


@pytest.mark.parametrize("name", FOOLBOX)
def test_foolbox_attacks_that_read_decisions_get_exact_ones(name: str) -> None:
    spy = Spy()
    FOOLBOX[name](spy, FastPyTorchModel(spy.fast, bounds=(0, 1)))
    assert spy.verdict() == "exact"


def test_foolboxs_own_model_around_a_fast_one_is_no_other_case() -> None:
    spy = Spy()
    FOOLBOX["DDN"](spy, fb.PyTorchModel(spy.fast, bounds=(0, 1), device=spy.fast.device))
    assert spy.verdict() == "exact"


@pytest.mark.parametrize("name", FIXED)
def test_foolbox_attacks_with_a_fixed_budget_stay_fast(name: str) -> None:
    spy = Spy()
    FIXED[name](spy, FastPyTorchModel(spy.fast, bounds=(0, 1)))
    assert spy.verdict() == "fast"


class OwnCW(torchattacks.CW):  # type: ignore[misc]
    """A user's variant, nothing of which is written in torchattacks' file but ``__call__``."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.get_logits(x).sum(), x)
        return (images + 0.01 * gradient.sign()).clamp(0, 1).detach()


TORCHATTACKS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "CW": ("exact", lambda m: torchattacks.CW(m, steps=2)),
    "DeepFool": ("exact", lambda m: torchattacks.DeepFool(m, steps=2)),
    "SparseFool": ("exact", lambda m: torchattacks.SparseFool(m, steps=1)),
    "FAB": ("exact", lambda m: torchattacks.FAB(m, steps=1, n_classes=10)),
    "EADL1": ("exact", lambda m: torchattacks.EADL1(m, binary_search_steps=1, max_iterations=10)),
    "EADEN": ("exact", lambda m: torchattacks.EADEN(m, binary_search_steps=1, max_iterations=10)),
    "JSMA": ("exact", lambda m: torchattacks.JSMA(m, theta=0.5, gamma=0.02)),
    "TPGD": ("exact", lambda m: torchattacks.TPGD(m, steps=2)),
    "own CW": ("exact", OwnCW),
    "PGD": ("fast", lambda m: torchattacks.PGD(m, steps=2)),
    "FGSM": ("fast", torchattacks.FGSM),
    "APGD": ("fast", lambda m: torchattacks.APGD(m, steps=2)),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # SparseFool and numpy 2
@pytest.mark.parametrize("name", TORCHATTACKS)
def test_torchattacks_attacks_on_a_bare_fast_model(name: str) -> None:
    spy = Spy()
    expected, make = TORCHATTACKS[name]
    make(spy.fast)(spy.x, spy.y)
    assert spy.verdict() == expected


@pytest.mark.parametrize(("name", "expected"), [("fab", "exact"), ("apgd", "fast")])
def test_attacks_of_the_reference_autoattack_on_a_bare_fast_model(name: str, expected: str) -> None:
    spy = Spy()
    attack = getattr(pyautoattack.AutoAttack(spy.fast, seed=0), name)
    attack.n_iter = 2
    attack.perturb(spy.x, spy.y)
    assert spy.verdict() == expected


METHODS: dict[str, tuple[str, Callable[[Spy], Any]]] = {
    "DeepFool": ("exact", lambda s: torchattacks.DeepFool(s.fast, steps=2).forward_return_target_labels(s.x, s.y)),
    "DeepFool, one image": ("exact", lambda s: torchattacks.DeepFool(s.fast)._forward_indiv(s.x[:1], s.y[0])),
    "FAB": ("exact", lambda s: torchattacks.FAB(s.fast, steps=1, n_classes=10).attack_single_run(s.x, s.y)),
    "JSMA": ("exact", lambda s: torchattacks.JSMA(s.fast).compute_jacobian(s.x[:1])),
    "C&W, its logits": ("exact", lambda s: torchattacks.CW(s.fast).get_logits(s.x.clone().requires_grad_())),
    "PGD, its logits": ("fast", lambda s: torchattacks.PGD(s.fast).get_logits(s.x.clone().requires_grad_())),
    "APGD": ("fast", lambda s: torchattacks.APGD(s.fast, steps=2).attack_single_run(s.x, s.y)),
    "the reference FAB": ("exact", lambda s: reference_fab(s).attack_single_run(s.x, s.y)),
    "foolbox DDN": ("exact", lambda s: run_alone(s, FastPyTorchModel(s.fast, bounds=(0, 1)))),
}


def reference_fab(spy: Spy) -> Any:
    attack = pyautoattack.AutoAttack(spy.fast, seed=0).fab
    attack.n_iter = 1
    return attack


@pytest.mark.parametrize("name", METHODS)
def test_an_attack_is_known_by_whichever_method_it_is_called(name: str) -> None:
    spy = Spy()
    expected, call = METHODS[name]
    call(spy)
    assert spy.verdict() == expected


def test_attacks_inside_attacks_count_with_those_around_them() -> None:
    spy = Spy()
    fast = torchattacks.PGD(spy.fast, steps=1)
    torchattacks.MultiAttack([fast, torchattacks.APGD(spy.fast, steps=1)])(spy.x, spy.y)
    assert spy.verdict() == "fast"
    spy.seen.clear()
    around = torchattacks.DeepFool(spy.fast)
    around.get_logits = lambda x: spy.net(fast(x.detach(), spy.y[:1]))
    around(spy.x[:1], spy.y[:1] * 0 - 1)
    assert spy.verdict() == "exact"


@pytest.mark.parametrize("decisions", ["exact", "fast"])
def test_what_was_given_is_obeyed(decisions: Any) -> None:
    for name in ("DDN", "CW"):
        spy = Spy(decisions=decisions)
        if name == "CW":
            torchattacks.CW(spy.fast, steps=2)(spy.x, spy.y)
        else:
            FOOLBOX[name](spy, FastPyTorchModel(spy.fast, bounds=(0, 1)))
        assert spy.verdict() == decisions


def test_attacks_of_nobodys_stay_fast() -> None:
    spy = Spy()
    x = spy.x.clone().requires_grad_()
    spy.fast(x)
    assert spy.verdict() == "fast"


def test_after_the_attack_all_is_as_before() -> None:
    spy = Spy()
    FOOLBOX["DDN"](spy, FastPyTorchModel(spy.fast, bounds=(0, 1)))
    spy.seen.clear()
    FIXED["PGD"](spy, FastPyTorchModel(spy.fast, bounds=(0, 1)))
    assert spy.verdict() == "fast"
