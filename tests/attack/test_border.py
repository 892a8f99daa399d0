"""SafePGD at the border: repeatability, the caller's modes, shapes, what it leaves alone, and clear errors."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv_adapters.attack import LossName, Norm
from fastadv_adapters.attack.safe_pgd import SafePGD, plain
from tests.attack.test_balls import NORMS
from tests.attack.test_safe_pgd import EPS, seed, task

pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.parametrize("norm", NORMS)
def test_a_generator_makes_it_repeatable(norm: Norm) -> None:
    net, x, y = task(6)
    runs = [SafePGD(net, eps=EPS[norm], norm=norm, steps=2, restarts=2, generator=seed(s))(x, y) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    SafePGD(net, eps=EPS[norm], norm=norm, steps=1, generator=seed())(x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_generator_the_global_seed_decides() -> None:
    net, x, y = task(6)
    attack, runs = SafePGD(net, eps=0.02, steps=1), []
    for value in (3, 3, 4):
        torch.manual_seed(value)
        runs.append(attack(x, y))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_without_random_start_nothing_is_drawn_and_one_restart_is_made() -> None:
    net, x, y = task(6)
    fast, state = plain(net), torch.get_rng_state()
    attack = SafePGD(fast, eps=0.02, steps=3, random_start=False, restarts=4)
    assert torch.equal(attack(x, y), attack(x, y))
    assert torch.equal(state, torch.get_rng_state())
    assert fast.gradient_stats.passes == 6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_caller_may_be_in_any_mode(context: Callable[[], Any]) -> None:
    net, x, y = task(6)
    attack = SafePGD(net, eps=0.02, steps=2, early_stop=True, random_start=False)
    expected = attack(x, y)
    with context():
        found = attack(x * 1.0, y + 0)
    assert torch.equal(found, expected)
    assert not found.is_inference()


def test_empty_and_single_batches_and_flat_inputs() -> None:
    net, x, y = task(3)
    attack = SafePGD(net, eps=0.02, steps=3, random_start=False)
    empty = attack(x[:0], y[:0])
    assert empty.shape == (0, 3, 8, 8)
    torch.testing.assert_close(torch.cat([attack(x[i : i + 1], y[i : i + 1]) for i in range(3)]), attack(x, y))
    flat = SafePGD(nn.Linear(5, 3), eps=0.02, steps=3)(torch.rand(4, 5), torch.tensor([0, 1, 2, 0]))
    assert flat.shape == (4, 5)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type_and_no_steps_at_all(kind: torch.dtype) -> None:
    net, x, y = task(4)
    still = SafePGD(net, eps=0.02, steps=0, random_start=False)(x, y.to(kind))
    assert torch.equal(still, x)
    assert still.data_ptr() != x.data_ptr()
    assert not torch.equal(SafePGD(net, eps=0.02, steps=0, loss="margin")(x, y.to(kind)), x)


def test_a_plain_model_is_attacked_in_eval_mode_and_left_as_it_was() -> None:
    net, x, y = task(6)
    training = copy.deepcopy(net).train()
    settings: dict[str, Any] = {"eps": 0.02, "steps": 2, "random_start": False}
    assert torch.equal(SafePGD(training, **settings)(x, y), SafePGD(net, **settings)(x, y))
    assert training.training


def test_a_function_before_the_model_is_part_of_what_is_attacked() -> None:
    net, x, y = task(8)

    def normalise(t: Tensor) -> Tensor:
        return (t - 0.4) / 0.3

    whole = nn.Sequential(Affine(), net)
    settings: dict[str, Any] = {"eps": 0.02, "steps": 3, "random_start": False}
    attack = SafePGD(net, **settings)
    attack.before = normalise
    torch.testing.assert_close(attack(x, y), SafePGD(whole, **settings)(x, y))


def test_a_model_in_float64_is_attacked_in_float64() -> None:
    net, x, y = task(6)
    attack = SafePGD(net.double(), eps=0.02, steps=2)
    assert "float64" in repr(attack.model)
    assert attack(x.double(), y).dtype == torch.float64


class Affine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.4) / 0.3


class Reads(TorchDispatchMode):
    """Counts the operators that wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        waits = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += int(masked or waits)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.usefixtures("as_on_a_device")
def test_the_loop_never_waits_for_the_device(norm: Norm, loss: LossName) -> None:
    net, x, y = task(6)
    counts = []
    for steps in (1, 5):
        attack = SafePGD(net, eps=0.02, norm=norm, steps=steps, restarts=steps, loss=loss, generator=seed())
        attack(x, y)  # the first call checks the model
        with Reads() as reads:  # type: ignore[no-untyped-call]
            attack(x, y)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 6  # four values read at once at the border, and who is to be attacked again


# Errors


@pytest.mark.parametrize(
    ("setting", "kind", "text"),
    [
        ({"eps": -0.1}, ValueError, r"eps to be finite and at least 0, got -0\.1\. Pass"),
        ({"eps": math.nan}, ValueError, r"eps to be finite and at least 0, got nan\. Pass"),
        ({"eps": math.inf}, ValueError, r"eps to be finite and at least 0, got inf\. Pass"),
        ({"eps": "8/255"}, TypeError, r"eps to be a number, got str\. Pass"),
        ({"alpha": -1.0}, ValueError, r"alpha to be finite and at least 0, got -1\.0\. Pass"),
        ({"alpha": True}, TypeError, r"alpha to be a number, got bool\. Pass"),
        ({"steps": -1}, ValueError, r"steps to be at least 0, got -1\. Pass"),
        ({"steps": 2.0}, TypeError, r"steps to be an int, got float 2\.0\. Pass"),
        ({"restarts": 0}, ValueError, r"restarts to be at least 1, got 0\. Pass"),
        ({"restarts": True}, TypeError, r"restarts to be an int, got bool True\. Pass"),
        ({"norm": "l3"}, ValueError, r"norm to be one of 'linf', 'l2', 'l1', got 'l3'\. Choose"),
        ({"loss": "hinge"}, ValueError, r"loss to be one of 'auto', 'ce', 'dlr', 'margin' .* got 'hinge'\. Choose"),
        ({"bounds": (1, 0)}, ValueError, r"bounds \(lower, upper\) with lower < upper, got \(1, 0\)\. Swap"),
        ({"bounds": (0, math.nan)}, ValueError, r"bounds \(lower, upper\) with lower < upper, got \(0, nan\)\. Swap"),
        ({"bounds": 1}, TypeError, r"bounds to be two numbers \(lower, upper\), got 1\. Pass"),
        ({"bounds": (0, 1, 2)}, TypeError, r"bounds to be two numbers \(lower, upper\), got \(0, 1, 2\)\. Pass"),
        ({"generator": 7}, TypeError, r"generator to be a torch\.Generator or None, got int\. Pass"),
    ],
)
def test_wrong_settings_are_clear_errors(setting: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"expected {text}"):
        SafePGD(nn.Linear(2, 2), **{"eps": 0.1, **setting})


def replaced(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (lambda x, y: (x.numpy(), y), TypeError, r"x to be a torch\.Tensor, got ndarray\. Convert"),
        (lambda x, y: (x, y.tolist()), TypeError, r"y to be a torch\.Tensor, got list\. Convert"),
        (lambda x, y: ((x * 255).byte(), y), TypeError, r"x to be floating, got torch\.uint8\. Convert"),
        (lambda x, y: (x[:, 0, 0, 0], y), ValueError, r"x of shape \(N, \.\.\.\) .*, got \(4,\)\. Add"),
        (lambda x, y: (x[:, :0], y), ValueError, r"x of shape \(N, \.\.\.\) .*, got \(4, 0, 8, 8\)\. Add"),
        (lambda x, y: (x, y.float()), TypeError, r"y to hold integer class labels, got torch\.float32\. Convert"),
        (lambda x, y: (x, y > 3), TypeError, r"y to hold integer class labels, got torch\.bool\. Convert"),
        (lambda x, y: (x, y[:3]), ValueError, r"y of shape \(4,\), .*, got \(3,\)\. Pass class indices"),
        (lambda x, y: (x, y[:, None]), ValueError, r"y of shape \(4,\), .*, got \(4, 1\)\. Pass class indices"),
        (lambda x, y: (x, y - 10), ValueError, r"labels of at least 0, got -\d+ in y\. Drop"),
        (
            lambda x, y: (x, y + 10),
            ValueError,
            r"labels below the number of classes, 10, got 1\d in y\. Count labels from 0",
        ),
        (lambda x, y: (replaced(x, math.nan), y), ValueError, r"x to be finite, got NaN or infinite .* Find"),
        (lambda x, y: (replaced(x, math.inf), y), ValueError, r"x to be finite, got NaN or infinite .* Find"),
        (lambda x, y: (replaced(x, 1.5), y), ValueError, r"x within bounds \(0, 1\), got .* to 1\.5\. If x is normal"),
        (
            lambda x, y: (4 * x - 2, y),
            ValueError,
            r"x within .*\. If .*nn\.Sequential\(Normalize, model\).* pass the b",
        ),
        (
            lambda x, y: (255 * x, y),
            ValueError,
            r"x within bounds \(0, 1\), got .*\. Divide x by 255; or, .*=\(0, 255\)",
        ),
        (lambda x, y: (replaced(x, -0.25), y), ValueError, r"x within bounds \(0, 1\), got values from -0\.25 to"),
        (lambda x, y: (x.to("meta"), y), ValueError, r"x on cpu, where the model is, got meta\. Move it"),
        (lambda x, y: (x, y.to("meta")), ValueError, r"y on cpu, where x is, got meta\. Move it"),
    ],
)
def test_wrong_inputs_are_clear_errors(
    spoil: Callable[[Tensor, Tensor], Any], kind: type[Exception], text: str
) -> None:
    net, x, y = task(4)
    with pytest.raises(kind, match=f"expected {text}"):
        SafePGD(net, eps=0.1, steps=1)(*spoil(x, y))


@pytest.mark.filterwarnings("ignore:.*the gradient of one sample reaches other samples")  # of an LSTM's sequence
@pytest.mark.parametrize(
    ("tail", "got"),
    [(nn.Unflatten(1, (5, 2)), r"shape \(4, 5, 2\)"), (nn.Flatten(0), r"shape \(40,\)"), (nn.LSTM(10, 3), "tuple")],
)
def test_a_model_without_logits_is_a_clear_error(tail: nn.Module, got: str) -> None:
    net, x, y = task(4)
    with pytest.raises(ValueError, match=rf"expected the model to return logits of shape \(4, C\), got {got}\. Wrap"):
        SafePGD(nn.Sequential(net, tail), eps=0.1, steps=1)(x, y)


def test_what_is_no_model_is_a_clear_error() -> None:
    with pytest.raises(TypeError, match=r"expected .*nn\.Module.*got function"):
        SafePGD(lambda x: x, eps=0.1)  # type: ignore[arg-type]


def test_bounds_are_compared_in_the_dtype_of_the_inputs() -> None:
    net = nn.Linear(3, 2).bfloat16()
    x = torch.full((1, 3), 0.3, dtype=torch.bfloat16)  # more than 0.3 when measured in float64
    assert SafePGD(net, eps=0.1, steps=1, bounds=(0, 0.3))(x, torch.tensor([0])).dtype == torch.bfloat16


def test_the_repr_holds_the_settings() -> None:
    text = repr(SafePGD(nn.Linear(2, 2), eps=0.1, alpha=0.02, norm="l2", loss="dlr"))
    assert text == (
        "SafePGD(eps=0.1, alpha=0.02, steps=10, norm='l2', random_start=True, restarts=1, targeted=False, "
        "loss='dlr', bounds=(0.0, 1.0), early_stop=False)"
    )
