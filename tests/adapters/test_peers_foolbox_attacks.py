"""foolbox's attacks and criteria as their users know them, with a fast model in the place of the plain one."""

import copy
from typing import Any

import eagerpy as ep
import foolbox as fb
import pytest
import torch
from foolbox.attacks import (
    L2PGD,
    BoundaryAttack,
    DatasetAttack,
    DDNAttack,
    L2CarliniWagnerAttack,
    L2RepeatedAdditiveGaussianNoiseAttack,
    LinearSearchBlendedUniformNoiseAttack,
    LinfPGD,
    VirtualAdversarialAttack,
)
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from torch import Tensor

from fastadv_adapters.foolbox import FastPyTorchModel, SafeLinfPGD
from tests.support.peers import EQUAL, USUAL, Problem, assert_as_strong, seeded
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")

STEPS = LinfPGD(steps=4, rel_stepsize=0.3)
SAFE = SafeLinfPGD(steps=4, rel_stepsize=0.3)


@pytest.fixture
def problem() -> Problem:
    return Problem()


# --- criteria ---------------------------------------------------------------------------------------------------------


class Sure(Criterion):
    """Adversarial only where the model is sure of what it says."""

    def __repr__(self) -> str:
        return "Sure()"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        logits, restore = ep.astensor_(outputs)
        return restore(logits.softmax(axis=-1).max(axis=-1) > 0.5)


TARGETED: dict[str, tuple[Any, Any]] = {
    "PGD": (STEPS, 0.05),
    "L2PGD": (L2PGD(steps=4), 0.5),
    "CarliniWagner": (L2CarliniWagnerAttack(binary_search_steps=2, steps=10), None),
    "DDN": (DDNAttack(steps=10), None),
}
MINIMISING = ("CarliniWagner", "DDN")


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_attacks(problem: Problem, name: str) -> None:
    attack, epsilon = TARGETED[name]
    criterion = TargetedMisclassification(problem.targets)
    _, clipped, success = problem.same(lambda model: attack(model, problem.x, criterion, epsilons=epsilon))
    assert success.any()
    assert torch.equal(problem.plain(clipped).argmax(1) == problem.targets, success)


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("options", USUAL.values(), ids=USUAL.keys())
def test_targeted_attacks_at_usual_options(name: str, options: Any) -> None:
    """What minimises gets exact decisions by itself."""
    problem = Problem(fast=options, samples=100)
    attack, epsilon = TARGETED[name]
    assert_as_strong(
        attack, problem.plain, problem.fast, problem.x, TargetedMisclassification(problem.targets), epsilon
    )


@pytest.mark.parametrize("name", MINIMISING)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_decisions_of_gradient_passes_would_weaken_what_minimises_and_are_no_success(
    name: str, targeted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv_adapters.model.read_by_caller", lambda: "")
    problem = Problem(fast={"dtype": torch.bfloat16}, samples=100)
    criterion = TargetedMisclassification(problem.targets) if targeted else Misclassification(problem.y)
    attack, epsilon = TARGETED[name]
    run = lambda model: attack(model, problem.x, criterion, epsilons=epsilon)  # noqa: E731
    (_, _, fooled), (_, found, success) = (seeded(run, model) for model in (problem.plain, problem.fast))
    assert torch.equal(success, criterion(found, problem.plain(found)))
    assert success.sum() < fooled.sum(), "or exact decisions are not needed"


def test_criteria_joined_by_and(problem: Problem) -> None:
    criterion = Misclassification(problem.y) & Sure()
    attack = LinearSearchBlendedUniformNoiseAttack(steps=20)
    _, found, success = problem.same(lambda model: attack(model, problem.x, criterion, epsilons=None), EQUAL)
    assert success.any()
    sure = problem.plain(found).softmax(1).max(1).values > 0.5
    assert sure[success].all()
    walk = BoundaryAttack(init_attack=attack, steps=10)
    problem.same(lambda model: walk(model, problem.x, criterion, epsilons=None), EQUAL)
    both = TargetedMisclassification(problem.targets) & Misclassification(problem.y)
    problem.same(lambda model: both(problem.x, model(problem.x)))


def test_a_criterion_without_a_loss_is_an_error_with_gradient_attacks(problem: Problem) -> None:
    criterion = Misclassification(problem.y) & Sure()
    for model in (problem.plain, problem.fast):
        with pytest.raises(ValueError, match="unsupported criterion"):
            STEPS(model, problem.x, criterion, epsilons=0.1)
        with pytest.raises(TypeError, match=r"expected labels, Misclassification or .*, got _And"):
            SafeLinfPGD(steps=1)(model, problem.x, criterion, epsilons=0.1)


# --- calling an attack ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [STEPS, SAFE], ids=["foolbox", "safe"])
def test_lists_of_budgets(problem: Problem, attack: Any) -> None:
    budgets = [0.0, 0.005, 0.02]
    raw, clipped, success = problem.same(lambda m: attack(m, problem.x, problem.y, epsilons=budgets))
    assert (len(raw), len(clipped), success.shape) == (3, 3, (3, 10))
    for images, budget in zip(clipped, budgets, strict=True):
        assert float((images - problem.x).abs().max()) <= budget + 1e-6


def test_budgets_of_a_minimising_attack(problem: Problem) -> None:
    attack = DDNAttack(steps=10)
    _, _, success = problem.same(lambda m: attack(m, problem.x, problem.y, epsilons=[None, 0.05, 0.5]))
    assert success[0].sum() >= success[2].sum() >= success[1].sum()


def test_no_budget_where_one_is_needed_is_an_error(problem: Problem) -> None:
    for model in (problem.plain, problem.fast):
        with pytest.raises(NotImplementedError, match="do not yet support None in epsilons"):
            STEPS(model, problem.x, problem.y, epsilons=None)
        with pytest.raises(TypeError, match="expected epsilons to be a number, got NoneType"):
            SafeLinfPGD(steps=1)(model, problem.x, problem.y, epsilons=None)


@pytest.mark.parametrize("attack", [STEPS, SAFE], ids=["foolbox", "safe"])
def test_repeated_attacks(problem: Problem, attack: Any) -> None:
    budgets = [0.002, 0.01]
    once = problem.same(lambda m: attack(m, problem.x, problem.y, epsilons=budgets))[2].sum()
    often = problem.same(lambda m: attack.repeat(3)(m, problem.x, problem.y, epsilons=budgets))[2].sum()
    assert often >= once


def test_repeated_noise(problem: Problem) -> None:
    noise = L2RepeatedAdditiveGaussianNoiseAttack(repeats=4)
    problem.same(lambda m: noise(m, problem.x, problem.y, epsilons=[0.5, 2.0]), EQUAL)


@pytest.mark.parametrize("attack", [STEPS, SafeLinfPGD(steps=4), DDNAttack(steps=4)], ids=["PGD", "safe", "DDN"])
@pytest.mark.parametrize("wrapped", [(False, False), (True, True), (True, False), (False, True)])
def test_raw_and_eagerpy_tensors(problem: Problem, attack: Any, wrapped: tuple[bool, bool]) -> None:
    inputs, labels = (ep.astensor(t) if w else t for t, w in zip((problem.x, problem.y), wrapped, strict=True))
    results = problem.same(lambda m: attack(m, inputs, labels, epsilons=0.05))
    assert all(isinstance(result, ep.Tensor if wrapped[0] else Tensor) for result in results)


def test_a_data_set_attack(problem: Problem) -> None:
    def attack(model: Any) -> Any:
        found = DatasetAttack()
        found.feed(model, batch(30, seed=3)[0])
        return found(model, problem.x, problem.y, epsilons=None)

    assert problem.same(attack, EQUAL)[2].all()


def test_estimated_gradients(problem: Problem) -> None:
    estimated: Any = fb.gradient_estimators.es_gradient_estimator(
        LinfPGD, samples=6, sigma=0.01, bounds=(0, 1), clip=True
    )
    problem.same(lambda m: estimated(steps=2)(m, problem.x, problem.y, epsilons=0.02), EQUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attack_that_compares_clean_and_perturbed_logits_needs_exact_ones(dtype: torch.dtype) -> None:
    """Its first steps are far below half precision; with exact decisions both logits are rounded alike."""
    net, (x, _) = attackable_net(), batch(10)
    y = net(x).argmax(1)
    attack = VirtualAdversarialAttack(steps=5, xi=1e-2)
    plain = fb.PyTorchModel(copy.deepcopy(net), (0, 1))
    fast = FastPyTorchModel(net, (0, 1), dtype=dtype, decisions="exact")
    expected, found = (seeded(lambda m: attack(m, x, y, epsilons=0.3), model)[2].sum() for model in (plain, fast))
    assert expected > 0
    assert abs(int(found) - int(expected)) <= 1


def test_attacks_and_criteria_print_themselves(problem: Problem) -> None:
    assert repr(SafeLinfPGD(steps=4)) == repr(LinfPGD(steps=4)).replace(
        "LinfProjectedGradientDescentAttack", "SafeLinfPGD"
    )
    assert SafeLinfPGD(steps=4).distance is LinfPGD(steps=4).distance
    assert repr(Misclassification(problem.y) & Sure()).endswith("& Sure()")
