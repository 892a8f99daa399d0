"""foolbox's models and wrappers as their users know them, with a fast model in the place of the plain one."""

import copy
import warnings
from typing import Any

import eagerpy as ep
import foolbox as fb
import numpy as np
import pytest
import torch
from foolbox.attacks import DDNAttack, LinfPGD, SaltAndPepperNoiseAttack
from foolbox.criteria import Misclassification
from foolbox.models import ExpectationOverTransformationWrapper, ThresholdingWrapper
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel
from tests.support.peers import USUAL, Problem, Run, assert_as_strong, assert_same, seeded
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")

STEPS = LinfPGD(steps=4, rel_stepsize=0.3)


@pytest.fixture
def problem() -> Problem:
    return Problem()


# --- the model --------------------------------------------------------------------------------------------------------


PREPROCESSING: dict[str, Any] = {
    "none": None,
    "lists": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "axis": -3},
    "float32 arrays": {
        "mean": np.array([0.5, 0.4, 0.3], "float32"),
        "std": np.array([0.2, 0.3, 0.4], "float32"),
        "axis": -3,
    },
    "tensors": {"mean": torch.tensor([0.5, 0.4, 0.3]), "axis": -3},
    "eagerpy": {"std": ep.astensor(torch.full((3, 1, 1), 0.5))},
    "flipped": {"mean": [0.5, 0.4, 0.3], "axis": -3, "flip_axis": -3},
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_preprocessing(name: str) -> None:
    problem = Problem(preprocessing=PREPROCESSING[name])
    problem.same(lambda model: model(problem.x))
    problem.same(lambda model: STEPS(model, problem.x, problem.y, epsilons=0.02))
    problem.same(lambda model: DDNAttack(steps=5)(model, problem.x, problem.y, epsilons=None))


@pytest.mark.parametrize(
    "options",
    [{"mean": [1, 2, 3], "axis": 1}, {"men": 1}, {"mean": [[1.0]], "axis": -1}],
    ids=["axis from the front", "unknown key", "two dimensions"],
)
def test_wrong_preprocessing_is_the_same_error(options: dict[str, Any]) -> None:
    net = attackable_net()
    with pytest.raises(ValueError, match=r"axis|unknown preprocessing key") as expected:
        fb.PyTorchModel(copy.deepcopy(net), (0, 1), preprocessing=options)
    with pytest.raises(ValueError, match=r"axis|unknown preprocessing key") as found:
        FastPyTorchModel(net, (0, 1), preprocessing=options)
    assert str(found.value) == str(expected.value)


HOW: dict[str, dict[str, bool]] = {"copy": {}, "in place": {"inplace": True}, "wrapper": {"wrapper": True}}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_transformed_bounds(problem: Problem, how: dict[str, bool]) -> None:
    def attack(model: Any) -> Any:
        other = copy.copy(model).transform_bounds((-1, 3), **how)
        assert tuple(other.bounds) == (-1, 3)
        return STEPS(other, problem.x * 4 - 1, problem.y, epsilons=0.08)

    problem.same(attack, {"rtol": 0, "atol": 1e-4})
    assert tuple(problem.fast.bounds) == (0, 1)
    assert problem.fast.transform_bounds((0, 1)).bounds == problem.plain.bounds


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("options", USUAL.values(), ids=USUAL.keys())
def test_transformed_bounds_at_usual_options(how: dict[str, bool], options: Any) -> None:
    problem = Problem(fast=options, samples=100)
    plain, fast = (model.transform_bounds((-1, 3), **how) for model in (problem.plain, problem.fast))
    assert tuple(fast.bounds) == (-1, 3)
    assert_as_strong(STEPS, plain, fast, problem.x * 4 - 1, Misclassification(problem.y), 0.08)


def test_transformed_bounds_in_place_and_wrapped_is_the_same_error(problem: Problem) -> None:
    for model in (problem.plain, problem.fast):
        with pytest.raises(ValueError, match="inplace and wrapper cannot both be True"):
            model.transform_bounds((0, 2), inplace=True, wrapper=True)


@pytest.mark.parametrize("bounds", [(0, 255), (-1, 1)])
def test_other_bounds_bound_the_attack(bounds: tuple[float, float]) -> None:
    net, (x, _) = attackable_net(), batch(6)
    low, high = bounds
    x = x * (high - low) + low
    plain, fast = fb.PyTorchModel(copy.deepcopy(net), bounds), FastPyTorchModel(net, bounds, dtype=torch.float32)
    expected, found = (seeded(lambda m: STEPS(m, x, m(x).argmax(1), epsilons=high / 10), m) for m in (plain, fast))
    assert_same(found, expected, {"rtol": 1e-5, "atol": 1e-4})
    assert found[1].min() >= low
    assert found[1].max() <= high


def test_gradients_only_where_the_input_wants_one(problem: Problem) -> None:
    for model in (problem.plain, problem.fast):
        assert model(problem.x.clone().requires_grad_()).requires_grad
        assert not model(problem.x).requires_grad
    problem.same(
        lambda model: ep.value_and_grad(lambda x: (model(x) ** 2).sum(), ep.astensor(problem.x)),
        {"rtol": 1e-4, "atol": 1e-5},
    )


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_sample_images_and_accuracy(problem: Problem, dataset: str) -> None:
    shape = (48, 48)
    images, labels = problem.same(lambda model: fb.samples(model, dataset=dataset, batchsize=4, shape=shape))
    problem.same(lambda model: model(images))
    assert fb.accuracy(problem.fast, images, labels) == fb.accuracy(problem.plain, images, labels)
    assert fb.accuracy(problem.fast, problem.x, problem.y) == 1
    for model in (problem.plain, problem.fast):
        with pytest.raises(ValueError, match=r"does not match model\.data_format"):
            fb.samples(model, data_format="channels_last")


def test_foolboxs_own_class_takes_a_fast_model(problem: Problem) -> None:
    direct = fb.PyTorchModel(FastAttackModel(problem.net, dtype=torch.float32), bounds=(0, 1))
    run: Run = lambda model: STEPS(model, problem.x, problem.y, epsilons=0.02)  # noqa: E731
    assert_same(seeded(run, direct), seeded(run, problem.plain))


def test_training_mode_is_no_cause_for_a_warning() -> None:
    net, (x, _) = attackable_net(), batch(4)
    plain = fb.PyTorchModel(copy.deepcopy(net), (0, 1))
    net.train()
    with pytest.warns(UserWarning, match="training mode"):
        fb.PyTorchModel(copy.deepcopy(net), (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = FastPyTorchModel(net, (0, 1), dtype=torch.float32, decisions="exact")
    assert_same(fast(x), plain(x))
    assert net.training


# --- wrappers ---------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Random at every call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + 0.05 * torch.randn_like(x))
        return out


def test_expectation_over_transformation(problem: Problem) -> None:
    problem.same(lambda model: ExpectationOverTransformationWrapper(model, n_steps=3)(problem.x))

    def attack(model: Any) -> Any:
        return STEPS(ExpectationOverTransformationWrapper(model, n_steps=3), problem.x, problem.y, epsilons=0.02)

    problem.same(attack)
    plain = fb.PyTorchModel(Noisy(copy.deepcopy(problem.net)).eval(), (0, 1))
    # A random model draws in memory order: only in the same layout are the numbers the same.
    fast = FastPyTorchModel(Noisy(problem.net).eval(), (0, 1), dtype=torch.float32, channels_last=False)
    fast(problem.x.clone().requires_grad_())  # the self-check draws nothing from the caller's generator
    assert_same(seeded(attack, fast), seeded(attack, plain))


def test_thresholding(problem: Problem) -> None:
    problem.same(lambda model: ThresholdingWrapper(model, 0.5)(problem.x))
    labels = ThresholdingWrapper(problem.plain, 0.5)(problem.x).argmax(1)
    attack = SaltAndPepperNoiseAttack(steps=10)
    problem.same(lambda model: attack(ThresholdingWrapper(model, 0.5), problem.x, labels, epsilons=None))
