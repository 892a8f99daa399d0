"""What is doubted of an accuracy, and how sure a share is."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fastadv_adapters import FastAttackWarning, SafePGD
from fastadv_adapters.attack import doubt_accuracy, doubt_images, wilson


def test_the_interval_is_that_of_wilson() -> None:
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert all(math.isfinite(end) for end in wilson(1, 1))


@pytest.mark.parametrize(
    ("right", "count", "classes", "doubted"),
    [
        (98, 1000, 10, True),
        (10, 1000, 10, True),  # even less than chance
        (12, 1000, 1000, False),  # little, but twelve times chance
        (2, 1000, 1000, True),
        (150, 1000, 10, False),
        (950, 1000, 10, False),
        (500, 1000, 2, True),
        (560, 1000, 2, False),
        (6, 64, 10, True),
        (20, 64, 10, False),
        (1, 8, 10, False),  # eight images say nothing
        (1, 1, 10, False),
        (2, 20, 10, False),
        (0, 1000, 10, False),  # there is another note for this
    ],
)
def test_an_accuracy_is_doubted_that_guessing_has(right: int, count: int, classes: int, doubted: bool) -> None:
    said = doubt_accuracy(right, count, classes)
    assert (said is not None) == doubted
    assert said is None or said.startswith(
        f"clean accuracy {right / count:.1%}".replace("%", " % is no better than chance for ") + f"{classes} classes"
    )


@pytest.mark.parametrize("count", [8, 16, 20, 32, 64, 128, 1000])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_model_that_knows_something_is_hardly_ever_doubted(count: int, classes: int) -> None:
    """Of an accuracy of 0.3 above chance one draw in a hundred at most is doubted, by few images or many."""
    share = 1 / classes + 0.3
    chances = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    assert sum(p for k, p in enumerate(chances) if doubt_accuracy(k, count, classes)) < 0.011


@pytest.mark.parametrize(
    ("eps", "bounds", "said"),
    [
        (8.0, (0.0, 1.0), "8/255, not 8"),
        (8 / 255, (0.0, 255.0), "8, not 8/255"),
        (8 / 255, (0.0, 1.0), None),
        (8.0, (-math.inf, math.inf), None),
        (8 / 255, (0.0, math.inf), None),
    ],
)
def test_safe_pgd_doubts_a_budget_in_other_units_once(
    eps: float, bounds: tuple[float, float], said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    attack = SafePGD(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), eps=eps, bounds=bounds, steps=1)
    for _ in range(2):
        attack(torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64))
    texts = [str(warning.message) for warning in recwarn if issubclass(warning.category, FastAttackWarning)]
    assert [said in text and "#budget-units" in text for text in texts if said] == ([True] if said else [])


@pytest.mark.parametrize(
    ("settings", "doubted"),
    [
        ({"alpha": 2 / 255}, True),
        ({"alpha": 0}, True),
        ({"alpha": 2}, False),
        ({"alpha": 0.09, "steps": 10}, False),  # short steps, and enough of them
        ({"alpha": None}, False),
        ({"alpha": 0, "steps": 0}, False),
        ({"alpha": 0, "eps": 0}, False),
    ],
)
def test_safe_pgd_doubts_steps_in_other_units(
    settings: dict[str, float], doubted: bool, recwarn: pytest.WarningsRecorder
) -> None:
    given: dict[str, Any] = {"eps": 8.0, "steps": 4, "bounds": (0, 255), **settings}
    attack = SafePGD(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), **given)
    for _ in range(2):
        attack(torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64))
    texts = [str(warning.message) for warning in recwarn if issubclass(warning.category, FastAttackWarning)]
    assert ["less than a tenth of eps 8" in text and "#budget-units" in text for text in texts] == [True] * doubted


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf), (-math.inf, 255.0)])
def test_images_say_nothing_of_bounds_without_an_end(bounds: tuple[float, float]) -> None:
    assert doubt_images(torch.rand(4, 3), bounds) is None
    assert doubt_images(torch.rand(4, 3), (0.0, 255.0)) is not None
