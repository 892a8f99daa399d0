"""Losses: values by hand, gradients that do not vanish, and a fallback where those of other losses do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import SafePGD
from fastadv_adapters.attack.losses import Loss, LossFunction, LossName, resolve_loss
from fastadv_adapters.boundary import Packed
from tests.support.tools import batch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOGITS = torch.tensor([[1.0, 4.0, 2.0, 0.5, -1.0], [3.0, -2.0, 0.0, 2.5, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 2])


def directions(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Directions at the logits, each of length one."""
    _, direction = loss.ascent(logits, labels)
    assert not direction.requires_grad
    return F.normalize(direction.double(), dim=1)


@pytest.mark.parametrize(
    ("name", "targeted", "expected"),
    [
        ("margin", False, [-2.0, 3.0]),
        ("margin", True, [2.0, -3.0]),
        ("dlr", False, [-2.0 / 3.0, 3.0 / 2.0]),
        ("dlr", True, [2.0 / (4 - 0.75), -3.0 / (3 - 0.5)]),
    ],
)
def test_values_are_those_worked_out_by_hand(name: LossName, targeted: bool, expected: list[float]) -> None:
    values = resolve_loss(name, targeted)(LOGITS, LABELS)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_softplus_of_ce_is_the_cross_entropy() -> None:
    values = resolve_loss("ce")(LOGITS, LABELS)
    torch.testing.assert_close(F.softplus(values), F.cross_entropy(LOGITS, LABELS, reduction="none"))
    torch.testing.assert_close(resolve_loss("ce", targeted=True)(LOGITS, LABELS), -values)


@pytest.mark.parametrize("targeted", [False, True])
def test_ce_has_the_direction_of_the_cross_entropy(targeted: bool) -> None:
    logits = LOGITS.clone().requires_grad_()
    sign = -1 if targeted else 1
    (gradient,) = torch.autograd.grad(sign * F.cross_entropy(logits, LABELS, reduction="sum"), logits)
    torch.testing.assert_close(directions(resolve_loss("ce", targeted), LOGITS, LABELS), F.normalize(gradient, dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 16.0, 1000.0])
@pytest.mark.parametrize("name", ["auto", "ce", "dlr", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
def test_no_direction_vanishes_however_sure_the_model(
    name: LossName, scale: float, dtype: torch.dtype, targeted: bool
) -> None:
    logits = (LOGITS * scale).to(dtype)
    loss = resolve_loss(name, targeted)
    _, direction = loss.ascent(logits, LABELS)
    assert bool(direction.isfinite().all())
    peaks = direction.abs().amax(1)
    assert bool((peaks > 0.1).all())
    if name != "dlr":  # the label's entry is not a difference of nearly equal numbers: it is there in full
        own = direction.gather(1, LABELS[:, None]).squeeze(1)
        assert bool((own == (1 if targeted else -1)).all())


def saturating(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def flat(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits * 0).sum(1)


def nan_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - logits).sum(1).sqrt()


@pytest.mark.parametrize("function", [flat, nan_gradient])
@pytest.mark.parametrize("targeted", [False, True])
def test_a_gradient_that_is_zero_or_not_finite_gives_way_to_the_margin(function: LossFunction, targeted: bool) -> None:
    found = directions(resolve_loss(function, targeted), LOGITS, LABELS)
    assert torch.equal(found, directions(resolve_loss("margin", targeted), LOGITS, LABELS))


def test_the_fallback_is_chosen_sample_by_sample() -> None:
    logits = LOGITS * torch.tensor([[1000.0], [1.0]], dtype=torch.float64)  # the first is saturated in float64 too
    found = directions(resolve_loss(saturating), logits, LABELS)
    torch.testing.assert_close(found[0], directions(resolve_loss("margin"), logits, LABELS)[0])
    torch.testing.assert_close(found[1], directions(resolve_loss("ce"), logits, LABELS)[1])


def test_dlr_on_its_plateau_gives_way_to_the_margin() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -4.0]])  # with the third as label the ratio is 1 all around
    found = directions(resolve_loss("dlr"), logits, torch.tensor([2]))
    torch.testing.assert_close(found, directions(resolve_loss("margin"), logits, torch.tensor([2])))


@pytest.mark.parametrize("name", ["auto", "ce", "dlr", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
def test_equal_logits_give_finite_values_and_directions(name: LossName, targeted: bool) -> None:
    values, direction = resolve_loss(name, targeted).ascent(torch.zeros(2, 5), torch.tensor([0, 4]))
    assert bool(values.isfinite().all())
    assert bool(direction.isfinite().all())
    assert bool((direction != 0).any(1).all())


def test_directions_exist_without_grad_mode_and_leave_the_logits_alone() -> None:
    logits = LOGITS.clone()
    with torch.no_grad():
        values, direction = resolve_loss("ce").ascent(logits, LABELS)
    assert not values.requires_grad
    assert not logits.requires_grad
    assert direction.shape == logits.shape


@pytest.mark.parametrize("loss", ["CE", "cw", ""])
def test_an_unknown_name_lists_the_choices(loss: str) -> None:
    with pytest.raises(
        ValueError, match=rf"one of 'auto', 'ce', 'dlr', 'margin' or a callable .* got '{loss}'. Choose"
    ):
        resolve_loss(loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [None, 3])
def test_what_is_neither_name_nor_callable_is_an_error(loss: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected loss to be one of .* got {type(loss).__name__}. Pass one"):
        resolve_loss(loss)


@pytest.mark.parametrize(
    ("name", "targeted", "classes", "least"),
    [("auto", False, 1, 2), ("ce", False, 1, 2), ("margin", True, 1, 2), ("dlr", False, 2, 3), ("dlr", True, 3, 4)],
)
def test_too_few_classes_are_an_error(name: LossName, targeted: bool, classes: int, least: int) -> None:
    with pytest.raises(ValueError, match=rf"C of at least {least} for the loss {name}.*got shape \(2, {classes}\)"):
        resolve_loss(name, targeted)(torch.zeros(2, classes), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (F.cross_entropy, r"\(\)"),
        (lambda logits, labels: logits, r"\(2, 5\)"),
        (lambda logits, labels: 0.0, "float"),
    ],
)
def test_a_loss_that_is_not_one_value_per_sample_is_an_error(function: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"one value per sample, shape \(2,\), got {got}. Return it without"):
        resolve_loss(function)(LOGITS, LABELS)


class NarrowBackward(torch.autograd.Function):
    """The mean square of two dtypes, which PyTorch up to 2.11 bears in the forward pass alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        if logits.dtype != torch.float32:
            raise RuntimeError("Found dtype Float but expected Double")
        gradient: Tensor = 2 * logits * grad[:, None]
        return gradient


def narrow_backward(logits: Tensor, labels: Tensor) -> Tensor:
    values: Tensor = NarrowBackward.apply(logits)  # type: ignore[no-untyped-call]
    return values


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0])
NARROW: dict[str, LossFunction] = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="none"),
    "embeddings": lambda logits, labels: F.cross_entropy(logits @ WEIGHTS.diag(), labels, reduction="none"),
    "a backward pass": narrow_backward,
    "a product per sample": lambda logits, labels: torch.einsum("nc,c->n", logits, WEIGHTS),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_loss_with_tensors_of_its_own_in_float32_is_given_outputs_in_float32(name: str) -> None:
    values, direction = resolve_loss(NARROW[name]).ascent(LOGITS, LABELS)
    leaf = LOGITS.float().requires_grad_()
    expected = NARROW[name](leaf, LABELS)
    torch.testing.assert_close(values, expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(F.normalize(direction), F.normalize(gradient.double()))


def test_an_error_of_the_loss_itself_is_that_of_its_first_call() -> None:
    seen: list[torch.dtype] = []

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.dtype)
        raise RuntimeError(f"call {len(seen)}")

    with pytest.raises(RuntimeError, match="call 1"):
        resolve_loss(broken)(LOGITS, LABELS)
    assert seen == [torch.float64, torch.float32]


def test_a_loss_without_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"differentiated by the logits, got values of accuracy without a gradient"):
        resolve_loss(accuracy).ascent(LOGITS, LABELS)


class WithoutOutputs(nn.Module):
    """A loss with a parameter that forgets the outputs, so that its values have a gradient, and the outputs none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        return self.scale * targets.double()


@pytest.mark.parametrize("classes", [True, False])
def test_a_loss_that_forgets_the_outputs_is_an_error(classes: bool) -> None:
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10)).eval(), batch(4)
    attack = SafePGD(net, eps=0.1, steps=1, loss=WithoutOutputs(), classes=classes)
    with pytest.raises(ValueError, match="differentiated by the logits, got values of WithoutOutputs without a grad"):
        attack(x, y)


def test_outputs_that_are_no_numbers_with_a_gradient_are_an_error() -> None:
    with pytest.raises(ValueError, match="differentiated by the logits, got values of own without a gradient"):
        Loss("own", WithoutOutputs()).differentiated(Packed(LABELS), LABELS, 2)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) != labels).double()
