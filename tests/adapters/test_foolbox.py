"""foolbox on fast models: a PyTorchModel in every respect, and the safe attacks."""

import copy
from typing import Any

import eagerpy as ep
import foolbox as fb
import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel, SafeL1PGD, SafeL2PGD, SafeLinfPGD
from fastadv_adapters.networks import Kind, Schedule
from tests.boundary.test_function import Faulty
from tests.support.tools import attackable_net, batch, head_of

pytestmark = pytest.mark.usefixtures("untouched")
BUDGET = 0.01
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "axis": -3}
SAFE = {SafeLinfPGD: BUDGET, SafeL2PGD: 0.3, SafeL1PGD: 4.0}


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model in eval mode, images, and the labels that it gives them."""
    net, (x, _) = attackable_net(), batch(12)
    return net, x, net(x).argmax(1)


def broken(net: nn.Module, x: Tensor, y: Tensor) -> int:
    assert x.isfinite().all()
    with torch.no_grad():
        return int((net(x).argmax(1) != y).sum())


@pytest.mark.parametrize("preprocessing", [None, PREPROCESSING, {"flip_axis": -3}])
def test_it_is_a_pytorch_model_in_every_respect(
    problem: tuple[nn.Module, Tensor, Tensor], preprocessing: dict[str, Any] | None
) -> None:
    net, x, y = problem
    fast = FastPyTorchModel(net, bounds=(0, 1), preprocessing=preprocessing, dtype=torch.float32)
    plain = fb.PyTorchModel(copy.deepcopy(net), bounds=(0, 1), preprocessing=preprocessing)
    assert isinstance(fast, fb.PyTorchModel)
    assert (fast.bounds, fast.data_format, fast.device) == (plain.bounds, plain.data_format, plain.device)
    exact = FastPyTorchModel(net, bounds=(0, 1), preprocessing=preprocessing, dtype=torch.float32, decisions="exact")
    torch.testing.assert_close(exact(x), plain(x))
    assert torch.equal(fast(x).argmax(1), plain(x).argmax(1))
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4 * float(plain(x).abs().amax()))
    torch.testing.assert_close(exact(ep.astensor(x)).raw, plain(ep.astensor(x)).raw)
    assert torch.equal(fast(ep.astensor(x)).raw, fast(x))
    for wrapper in (False, True):
        other, expected = (m.transform_bounds((-1, 3), wrapper=wrapper) for m in (fast, plain))
        assert tuple(other.bounds) == (-1, 3)
        torch.testing.assert_close(other(x * 4 - 1), expected(x * 4 - 1), rtol=1e-4, atol=1e-4)
    assert fb.accuracy(fast, ep.astensor(x), ep.astensor(y)) == fb.accuracy(plain, ep.astensor(x), ep.astensor(y))
    value, gradient = ep.value_and_grad(lambda x: fast(x).sum(), ep.astensor(x))
    _, expected_gradient = ep.value_and_grad(lambda x: plain(x).sum(), ep.astensor(x))
    assert value.raw.isfinite()
    torch.testing.assert_close(gradient.raw, expected_gradient.raw, rtol=1e-3, atol=1e-3)


ATTACKS: dict[str, tuple[Any, float | None]] = {
    "LinfPGD": (fb.attacks.LinfPGD(steps=5, rel_stepsize=0.3), BUDGET),
    "L2PGD": (fb.attacks.L2PGD(steps=5, rel_stepsize=0.3), 0.3),
    "LinfBasicIterative": (fb.attacks.LinfBasicIterativeAttack(steps=5), BUDGET),
    "FGSM": (fb.attacks.FGSM(), BUDGET),
    "DeepFool": (fb.attacks.L2DeepFoolAttack(steps=20), None),
    "DDN": (fb.attacks.DDNAttack(steps=20), None),
    "FMN": (fb.attacks.L2FMNAttack(steps=20), None),
    "CarliniWagner": (fb.attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=20), None),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attacks_are_as_strong_on_the_fast_model(
    name: str, dtype: torch.dtype, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    net, x, y = problem
    attack, epsilon = ATTACKS[name]
    decisions: Any = "exact" if epsilon is None else "auto"
    found = []
    for model in (
        fb.PyTorchModel(copy.deepcopy(net), bounds=(0, 1)),
        FastPyTorchModel(net, bounds=(0, 1), dtype=dtype, decisions=decisions),
    ):
        torch.manual_seed(1)
        _, clipped, _ = attack(model, x, y, epsilons=epsilon)
        found.append((broken(net, clipped, y), float((clipped - x).flatten(1).norm(dim=1).median())))
    assert found[0][0] > 0, "the test needs an attack that breaks something"
    assert found[1][0] >= found[0][0] - 1
    if epsilon is None:
        assert found[1][1] <= found[0][1] * 1.05


@pytest.mark.parametrize("kind", SAFE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("targeted", [False, True])
def test_safe_attacks_on_plain_and_fast(kind: Any, targeted: bool, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    runner_up = net(x).topk(2).indices[:, 1]
    criterion = fb.criteria.TargetedMisclassification(runner_up) if targeted else y
    models = {
        "plain": fb.PyTorchModel(copy.deepcopy(net), bounds=(0, 1)),
        "fast": FastPyTorchModel(net, bounds=(0, 1), dtype=torch.bfloat16),
        "other bounds": FastPyTorchModel(net, bounds=(0, 1), dtype=torch.float32).transform_bounds(
            (0, 255), wrapper=True
        ),
    }
    successes = {}
    for name, model in models.items():
        scale = model.bounds.upper
        raw, clipped, success = kind(steps=10, rel_stepsize=0.2)(
            model, x * scale, criterion, epsilons=SAFE[kind] * scale * 2
        )
        assert isinstance(raw, Tensor)
        assert clipped.isfinite().all()
        successes[name] = int(success.sum())
    assert successes["plain"] > 0
    assert abs(successes["fast"] - successes["plain"]) <= 2
    assert abs(successes["other bounds"] - successes["plain"]) <= 2


@pytest.mark.parametrize("kind", SAFE, ids=lambda kind: kind.__name__)
def test_a_saturated_loss_stops_only_the_unsafe_attack(kind: Any) -> None:
    net, (x, _) = attackable_net(), batch(12)
    y = net(x).argmax(1)
    with torch.no_grad():
        head_of(net).weight.mul_(1000)
        head_of(net).bias.mul_(1000)
    plain, fast = fb.PyTorchModel(copy.deepcopy(net), (0, 1)), FastPyTorchModel(net, (0, 1), dtype=torch.bfloat16)
    unsafe = kind.__mro__[2](steps=10, rel_stepsize=0.2)
    _, _, before = unsafe(plain, x, y, epsilons=SAFE[kind])
    for model in (plain, fast):
        _, _, success = kind(steps=10, rel_stepsize=0.2)(model, x, y, epsilons=SAFE[kind])
        assert success.sum() > before.sum()


@pytest.mark.parametrize("kind", SAFE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_gives_no_broken_image(kind: Any, value: float) -> None:
    net, (x, y) = Faulty([0, 2], value).eval(), batch(4)
    unsafe = kind.__mro__[2](steps=3)
    for model in (FastPyTorchModel(net, (0, 1), dtype=torch.float32), fb.PyTorchModel(copy.deepcopy(net), (0, 1))):
        raw, _, _ = kind(steps=3)(model, x, y, epsilons=BUDGET)
        assert raw.isfinite().all()
        if isinstance(model, FastPyTorchModel):
            assert unsafe(model, x, y, epsilons=BUDGET)[0].isfinite().all()
            assert model.fast.gradient_stats.nonfinite > 0


class OnlyFullPrecision(nn.Module):
    """Gradients of the last of many samples survive in float32 and are NaN in float16, which a scale might cure."""

    def __init__(self) -> None:
        super().__init__()
        self.net = attackable_net()

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        if h.dtype == torch.float16 and h.requires_grad and len(h) > 4:
            mask = torch.zeros_like(h)
            mask[-1] = float("nan")
            h.register_hook(lambda grad: grad + mask)
        out: Tensor = self.net[1:](h)
        return out


def test_samples_that_lost_their_gradient_are_attacked_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "is_losing", lambda *_, **__: False)  # else float32 serves them soon
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    net, (x, _) = OnlyFullPrecision().eval(), batch(6)
    y = net(x).argmax(1)
    fast = FastPyTorchModel(net, (0, 1), dtype=torch.float16)
    _, _, unsafe = fb.attacks.LinfPGD(steps=20, random_start=False)(fast, x, y, epsilons=0.1)
    _, _, safe = SafeLinfPGD(steps=20, random_start=False)(fast, x, y, epsilons=0.1)
    assert not unsafe[-1], "the test needs a sample that stands still without the rescue"
    assert safe.all()


class Never(fb.criteria.Criterion):
    """A criterion that gradient descent has no loss for."""

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        return outputs.argmax(-1) < 0

    def __repr__(self) -> str:
        return "Never()"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x, y: FastPyTorchModel(m, (1, 0)), ValueError, r"lower < upper, got \(1, 0\). Swap or widen"),
        (
            lambda m, x, y: FastPyTorchModel(m, (0, 1), device="meta"),
            ValueError,
            "own device cpu, got meta: move the model",
        ),
        (
            lambda m, x, y: FastPyTorchModel(FastAttackModel(m), (0, 1), fuse_bn=False),
            ValueError,
            "no options.*got fuse_bn",
        ),
        (
            lambda m, x, y: FastPyTorchModel(m, (0, 1), fuse=True),  # type: ignore[call-arg]
            TypeError,
            "unexpected keyword argument 'fuse'",
        ),
        (lambda m, x, y: attack(m, x, y, epsilons=-0.1), ValueError, "expected epsilons to be finite and at least 0"),
        (
            lambda m, x, y: SafeLinfPGD(random_start=0)(FastPyTorchModel(m, (0, 1)), x, y, epsilons=0.1),  # type: ignore[arg-type]
            ValueError,
            "expected random_start to be True or False, got 0",
        ),
        (lambda m, x, y: attack(m, x, y + 10), ValueError, "expected labels below 10, the number of classes, got 1"),
        (lambda m, x, y: attack(m, x, y - 11), ValueError, "expected labels of at least 0"),
        (lambda m, x, y: attack(m, x, y[:2]), ValueError, r"expected y of shape \(12,\)"),
        (lambda m, x, y: attack(m, x + 1, y), ValueError, "bounds"),
        (lambda m, x, y: attack(m, x * float("nan"), y), ValueError, "NaN"),
        (lambda m, x, y: attack(m, x, Never()), TypeError, "expected labels, Misclassification or .*, got Never"),
    ],
)
def test_wrong_input(call: Any, error: type[Exception], text: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    with pytest.raises(error, match=text):
        call(net, x, y)


def test_a_device_may_be_named_with_its_index_and_without(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    assert FastPyTorchModel(net, (0, 1), device="cpu:0", dtype=torch.float32).device == torch.device("cpu")
    model = fb.PyTorchModel(copy.deepcopy(net), (0, 1), device="cpu:0")  # it moves the module
    assert SafeLinfPGD(steps=1)(model, x, y, epsilons=BUDGET)[1].shape == x.shape


def attack(net: nn.Module, x: Tensor, y: Any, epsilons: float = BUDGET) -> Any:
    return SafeLinfPGD(steps=1)(FastPyTorchModel(net, (0, 1), dtype=torch.float32), x, y, epsilons=epsilons)
