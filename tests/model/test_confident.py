"""Half precision on networks whose logits are as large as long training makes them, where it fails without scaling.

The plain model judges. `python -m benchmarks.precision` does the same on a hundred images and more.
"""

from typing import Any

import foolbox as fb
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.precision.subjects import Multiplied, Settings
from benchmarks.precision.ways import ways
from benchmarks.shared.correctness import Outcome, Subject, judge
from benchmarks.shared.networks import resnet18
from digits import DigitsNet, accuracy, grey_digits, rgb_digits, train
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel

IMAGES, RESNET_IMAGES = 40, 10
SETTINGS = Settings(IMAGES, 10, 4, RESNET_IMAGES, 8, 8, 0)
COSINE_WITHIN = {"fast float16": 0.004, "fast bfloat16": 0.02}
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.long]


@pytest.fixture(scope="module")
def digits() -> Subject:
    """The digits network of the examples."""
    torch.manual_seed(0)
    net, data = DigitsNet(), grey_digits()
    train(net, data.train_images, data.train_labels, epochs=SETTINGS.epochs, seed=0, show_progress=False)
    return Subject("digits network", Multiplied(net, 2).eval(), data, 0.2, IMAGES)


@pytest.fixture(scope="module")
def resnet() -> Subject:
    """A ResNet-18 of width 8 on the digits as 32x32 RGB images."""
    torch.manual_seed(0)
    net, data = resnet18(width=SETTINGS.resnet_width), rgb_digits()
    train(
        net,
        data.train_images[:700],
        data.train_labels[:700],
        epochs=SETTINGS.resnet_epochs,
        seed=0,
        show_progress=False,
    )
    return Subject("ResNet-18", Multiplied(net, 4).eval(), data, 0.05, RESNET_IMAGES)


def images_of(subject: Subject) -> tuple[Tensor, Tensor]:
    return subject.data.test_images[: subject.images], subject.data.test_labels[: subject.images]


def outcomes_of(subject: Subject, model: nn.Module, names: list[str]) -> dict[str, Outcome]:
    rows = [row for row in ways() if row.key in names]
    return judge(rows, subject, steps=SETTINGS.steps, seed=SETTINGS.seed, model=model).outcomes


@pytest.mark.parametrize("name", ["digits", "resnet"])
def test_half_precision_is_as_right_as_float32_where_the_recipe_is_not(
    name: str, request: pytest.FixtureRequest
) -> None:
    subject: Subject = request.getfixturevalue(name)
    found = outcomes_of(subject, subject.model, ["plain float32", "fast float16", "fast bfloat16", "recipe float16"])
    plain = found["plain float32"]
    for way, within in COSINE_WITHIN.items():
        assert found[way].newly_zero == 0
        assert abs(found[way].cosine - plain.cosine) <= within
        assert found[way].robust <= plain.robust + 1 / subject.images + 1e-6
    assert found["recipe float16"].zero > 1 / 3
    assert found["recipe float16"].robust >= plain.robust + 0.1 - 1e-6


@pytest.mark.parametrize("name", ["digits", "resnet"])
def test_a_fixed_loss_scale_fails_once_the_logits_are_doubled(name: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(name)
    doubled = Multiplied(subject.model, 2).eval()
    found = outcomes_of(subject, doubled, ["plain float32", "fast float16", "recipe float16, loss scale 2^16"])
    assert found["recipe float16, loss scale 2^16"].zero > 1 / 5
    assert found["fast float16"].newly_zero == 0
    assert found["fast float16"].robust <= found["plain float32"].robust + 1 / subject.images + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_safe_pgd_is_as_strong_with_logits_times_sixteen(digits: Subject, dtype: torch.dtype) -> None:
    x, y = images_of(digits)
    robust = []
    for factor in (1, 16):
        model = Multiplied(digits.model, factor).eval()
        attack = SafePGD(FastAttackModel(model, dtype=dtype), eps=0.1, generator=torch.Generator().manual_seed(0))
        robust.append(accuracy(digits.model, attack(x, y), y))
    assert abs(robust[0] - robust[1]) <= 0.05 + 1e-6


ATTACKS: dict[str, Any] = {
    "HopSkipJump": fb.attacks.HopSkipJumpAttack(steps=4, max_gradient_eval_steps=30),
    "Boundary": fb.attacks.BoundaryAttack(steps=200),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_foolbox_black_box_attacks_are_as_strong_in_float16(digits: Subject, name: str) -> None:
    x, y = (part[:12] for part in images_of(digits))
    models = [fb.PyTorchModel(digits.model, (0, 1)), FastPyTorchModel(digits.model, (0, 1), dtype=torch.float16)]
    results = []
    for model in models:
        torch.manual_seed(0)
        results.append(ATTACKS[name](model, x, y, epsilons=None)[0])
    broken = [1 - accuracy(digits.model, found, y) for found in results]
    assert broken[0] == 1.0
    assert broken[1] == broken[0]
    distances = [float((found - x).flatten(1).norm(dim=1).median()) for found in results]
    assert distances[1] <= distances[0] * 1.01


def test_square_is_as_strong_in_float16(digits: Subject) -> None:
    x, y = images_of(digits)
    robust = []
    for model in (digits.model, FastAttackModel(digits.model, dtype=torch.float16)):
        attack = torchattacks.Square(model, eps=0.2, n_queries=100, seed=0)
        robust.append(accuracy(digits.model, attack(x, y), y))
    assert robust[0] < 1
    assert robust[1] == robust[0]
