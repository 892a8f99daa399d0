"""Minimum-norm attacks of foolbox on a fast model with default options are as strong as on the plain one."""

import copy
from typing import Any

import foolbox as fb
import numpy as np
import pytest
import torch
from foolbox.attacks import base
from torch import Tensor, nn

from digits import DigitsNet, grey_digits, predict, train
from fastadv_adapters.foolbox import FastPyTorchModel, accelerate

A = fb.attacks
IMAGES = 12
BRENDEL = {"steps": 20, "binary_search_steps": 10}
GRADIENT: dict[str, tuple[str, Any]] = {
    "DDNAttack": ("l2", {"steps": 20}),
    "L2CarliniWagnerAttack": ("l2", {"binary_search_steps": 4, "steps": 20, "stepsize": 0.05}),
    "EADAttack": ("l1", {"binary_search_steps": 4, "steps": 50, "initial_stepsize": 0.05}),
    "NewtonFoolAttack": ("l2", {"steps": 20}),
    "L2DeepFoolAttack": ("l2", {"steps": 15, "candidates": 3}),
    "LinfDeepFoolAttack": ("linf", {"steps": 15, "candidates": 3}),
    "L0FMNAttack": ("l0", {"steps": 20}),
    "L1FMNAttack": ("l1", {"steps": 20}),
    "L2FMNAttack": ("l2", {"steps": 20}),
    "LInfFMNAttack": ("linf", {"steps": 20}),
    "L2BrendelBethgeAttack": ("l2", BRENDEL),
}
SAME_BUT_FOR_THE_SOLVER = {"L0BrendelBethgeAttack", "L1BrendelBethgeAttack", "LinfinityBrendelBethgeAttack"}
"""numba compiles a solver for each, for half a minute. `make matrix` runs them; they share the code that asks."""
SEARCHES: dict[str, tuple[str, Any]] = {
    "InversionAttack": ("l2", {}),
    "BinarySearchContrastReductionAttack": ("l2", {}),
    "LinearSearchContrastReductionAttack": ("l2", {"steps": 20}),
    "GaussianBlurAttack": ("l2", {"steps": 20}),
    "SaltAndPepperNoiseAttack": ("l2", {"steps": 30}),
    "LinearSearchBlendedUniformNoiseAttack": ("l2", {"steps": 20, "directions": 10}),
    "BoundaryAttack": ("l2", {"steps": 20}),
    "HopSkipJumpAttack": ("l2", {"steps": 1, "initial_gradient_eval_steps": 10, "max_gradient_eval_steps": 10}),
    "PointwiseAttack": ("l0", {"l2_binary_search": False}),
    "BinarizationRefinementAttack": ("l2", {"threshold": 0.5}),
    "DatasetAttack": ("l2", {}),
}
NEEDS_A_DISTANCE = {
    "InversionAttack",
    "BinarySearchContrastReductionAttack",
    "LinearSearchContrastReductionAttack",
    "GaussianBlurAttack",
    "LinearSearchBlendedUniformNoiseAttack",
    "BinarizationRefinementAttack",
    "DatasetAttack",
}
STARTED = {"L2BrendelBethgeAttack", "BoundaryAttack", "HopSkipJumpAttack", "PointwiseAttack"}
pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("untouched"),
    pytest.mark.filterwarnings("ignore:At the first initialisation the optimizer:UserWarning"),
]


class Problem:
    """A confident network, images that it classifies correctly, and images of other classes to start from."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        data, self.net = grey_digits(), DigitsNet(width=8)
        train(self.net, data.train_images, data.train_labels, epochs=8, show_progress=False)
        right = predict(self.net, data.test_images) == data.test_labels
        self.x, self.y = data.test_images[right][:IMAGES], data.test_labels[right][:IMAGES]
        found = predict(self.net, data.train_images)
        self.others = torch.stack([data.train_images[found == (label + 1) % 10][0] for label in self.y.tolist()])

    def attack(self, name: str, settings: Any, model: Any, *, made_fast: Any = None) -> Tensor:
        """The images that this attack finds, the random state being the same each time."""
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        distance = {"distance": fb.distances.l2} if name in NEEDS_A_DISTANCE else {}
        attack = getattr(A, name)(**distance, **settings)
        if name == "DatasetAttack":
            attack.feed(model, torch.cat([self.x, self.others]))
        if made_fast is not None:
            attack = accelerate(attack, dtype=made_fast)
        more: dict[str, Any] = {"starting_points": self.others} if name in STARTED else {}
        if name == "BinarizationRefinementAttack":
            more = {"starting_points": self.others}
            model = fb.models.ThresholdingWrapper(model, 0.5)
        images: Tensor = attack(model, self.x, self.y, epsilons=None, **more)[1]
        return images

    def sizes(self, images: Tensor, norm: str) -> Tensor:
        """How large what an attack did to each image is, (N,); infinite where it broke it not."""
        broken = predict(self.net, images) != self.y
        change = (images - self.x).flatten(1)
        order = {"l0": 0, "l1": 1, "l2": 2, "linf": torch.inf}[norm]
        found: Tensor = torch.linalg.vector_norm(change, order, dim=1).where(broken, torch.inf)
        return found


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def plain(problem: Problem) -> Any:
    return fb.PyTorchModel(copy.deepcopy(problem.net), (0, 1))  # foolbox fills its gradients


def concrete(kind: type) -> bool:
    minimises = issubclass(kind, base.MinimizationAttack) and not kind.__module__.endswith(".base")
    return minimises and not getattr(kind, "__abstractmethods__", None)


def test_no_minimum_norm_attack_is_left_out() -> None:
    found = {kind.__name__ for kind in vars(A).values() if isinstance(kind, type) and concrete(kind)}
    assert found == {*GRADIENT, *SEARCHES, *SAME_BUT_FOR_THE_SOLVER}


@pytest.mark.parametrize("name", GRADIENT)
def test_as_strong_by_default_as_on_the_plain_model(name: str, problem: Problem, plain: Any) -> None:
    norm, settings = GRADIENT[name]
    sizes = problem.sizes(problem.attack(name, settings, plain), norm)
    assert sizes.isfinite().sum() >= 0.7 * IMAGES, "the test needs an attack that breaks most images"
    for dtype in (torch.bfloat16, torch.float16):
        ours = FastPyTorchModel(problem.net, (0, 1), dtype=dtype)
        for images in (
            problem.attack(name, settings, ours),
            problem.attack(name, settings, plain, made_fast=dtype),
        ):
            found = problem.sizes(images, norm)
            assert found.isfinite().sum() >= sizes.isfinite().sum(), (dtype, found, sizes)
            assert (found / sizes).nanmedian() <= 1.02, (dtype, found, sizes)


@pytest.mark.parametrize("name", SEARCHES)
def test_without_gradient_the_images_are_those_of_the_plain_model(name: str, problem: Problem, plain: Any) -> None:
    _, settings = SEARCHES[name]
    expected = problem.attack(name, settings, plain)
    for images in (
        problem.attack(name, settings, FastPyTorchModel(problem.net, (0, 1), dtype=torch.bfloat16)),
        problem.attack(name, settings, plain, made_fast=torch.bfloat16),
    ):
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def confident(net: nn.Module) -> nn.Module:
    """The same classes, with logits so far apart that a cross entropy in float32 is flat."""
    sure = copy.deepcopy(net)
    with torch.no_grad():
        sure.head.weight.mul_(30)  # type: ignore[union-attr, operator]
        sure.head.bias.mul_(30)  # type: ignore[union-attr, operator]
    return sure


def test_an_accelerated_cross_entropy_does_not_saturate(problem: Problem) -> None:
    sure = confident(problem.net)
    model = fb.PyTorchModel(copy.deepcopy(sure), (0, 1))
    attack = A.LinfPGD(steps=10, rel_stepsize=0.2, random_start=False)
    _, _, before = attack(model, problem.x, problem.y, epsilons=0.2)
    _, clipped, after = accelerate(attack, dtype=torch.bfloat16)(model, problem.x, problem.y, epsilons=0.2)
    assert int(after.sum()) > int(before.sum())
    assert bool(((predict(sure, clipped) != problem.y) == after).all())
