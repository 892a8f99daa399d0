"""SafePGD as the inner maximiser of a training loss: targets of any kind, with the rows of the samples at hand."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import torchattacks
from fastadv_adapters.attack import Norm
from fastadv_adapters.attack.balls import ball_around
from fastadv_adapters.attack.safe_pgd import SafePGD
from fastadv_adapters.attack.search import beside
from fastadv_adapters.model import FastAttackModel
from fastadv_adapters.networks import Kind
from tests.attack.test_balls import NORMS, assert_inside
from tests.attack.test_rescue import Spoilt, marked_task
from tests.attack.test_safe_pgd import EPS, each_cross_entropy, predict, seed, task
from tests.support.engines import use_engine

pytestmark = pytest.mark.usefixtures("untouched")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def divergence(logits: Tensor, clean: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), clean, reduction="none").sum(1)


def clean_of(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).softmax(1)  # type: ignore[no-any-return]


# What the loss is given


class Marked(nn.Module):
    """A network that tells which samples it was given, beside its logits: their last pixel, up to eps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x), "marks": x[:, -1, -1, -1] * 1}


def marked(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images whose last pixel says which one it is, and these pixels."""
    net, x, _ = task(n)
    x[:, -1, -1, -1] = torch.linspace(0.0, 1.0, n)
    return Marked(net), x, x[:, -1, -1, -1].clone()


Tree = Callable[[Tensor], Any]
TREES: dict[str, tuple[Tree, Callable[[Any], Tensor]]] = {
    "tensor": (lambda t: t, lambda y: y),
    "column": (lambda t: t[:, None], lambda y: y[:, 0]),
    "tuple": (lambda t: (t, None, t.half()), lambda y: y[0]),
    "named": (lambda t: Pair(t.bool(), t), lambda y: y.second),
    "list in dict": (lambda t: {"a": [t.long(), t], "b": t.bfloat16()}, lambda y: y["a"][1]),
    "labels beside": (lambda t: (torch.arange(len(t), dtype=torch.int32), t), lambda y: y[1]),
}


def shape_of(tree: Any) -> Any:
    """Structure and dtypes."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.dtype, tree)


@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.parametrize("name", TREES)
def test_the_loss_gets_the_tree_with_the_rows_of_the_samples_at_hand(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, marks_in = TREES[name]
    model, x, marks = marked(6)
    given = make(marks)
    before = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, given)
    if engine == "compile":
        use_engine(monkeypatch, engine)
    fast = FastAttackModel(model, dtype=torch.float32)
    seen: list[Any] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        seen.append(shape_of(targets))
        # The attack moves the mark by at most its budget, and marks lie further apart.
        assert bool(((outputs["marks"] - marks_in(targets)).abs() < 0.05).all())
        return outputs["logits"].logsumexp(1)  # type: ignore[no-any-return]

    found = SafePGD(fast, eps=0.04, steps=3, loss=loss, generator=seed())(x, given)
    assert bool((found != x).flatten(1).any(1).all())
    assert len(seen) >= 5
    assert all(type(s) is type(shape_of(given)) and s == shape_of(given) for s in seen)
    for left, right in zip(*map(torch.utils._pytree.tree_leaves, (given, before)), strict=True):
        assert left is right is None or torch.equal(left, right)


def test_without_targets_the_loss_gets_none() -> None:
    net, x, _ = task(4)

    def loss(logits: Tensor, targets: None) -> Tensor:
        assert targets is None
        return logits.logsumexp(1)

    found = SafePGD(net, eps=0.05, steps=3, loss=loss, generator=seed())(x, None)
    with torch.no_grad():
        assert bool((loss(net(found), None) > loss(net(x), None)).all())


def test_targets_are_the_losss_own_to_write_into() -> None:
    net, x, _ = task(4)
    clean = clean_of(net, x)
    kept = clean.clone()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        targets.zero_()
        return logits.logsumexp(1)

    SafePGD(net, eps=0.05, steps=2, loss=loss)(x, clean)
    assert torch.equal(clean, kept)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_were_broken_are_attacked_again_with_their_targets(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    net, x, _, rows = marked_task()
    clean = clean_of(net, x)
    fast = FastAttackModel(Spoilt(net, value), dtype=torch.float16)
    sizes: list[int] = []

    def loss(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append(len(targets[1]))
        probabilities, index = targets
        assert torch.equal(probabilities, clean[index])
        return divergence(logits, probabilities)

    y = (clean, torch.arange(len(x)))
    found = SafePGD(fast, eps=0.07, steps=5, loss=loss, generator=seed())(x, y)
    assert fast.gradient_stats.nonfinite > 0
    assert set(sizes) == {len(x), int(rows.sum())}
    expected = SafePGD(net, eps=0.07, steps=5, loss=divergence, generator=seed())(x, clean)
    assert ((found - expected).abs()[rows] < 1e-3).double().mean() > 0.98


def test_what_was_not_broken_is_not_attacked_again() -> None:
    net, x, _ = task(8)
    sizes: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(targets))
        return divergence(logits, targets)

    SafePGD(FastAttackModel(net, dtype=torch.bfloat16), eps=0.1, steps=4, loss=loss)(x, clean_of(net, x))
    assert sizes == [8] * 7  # the sample itself, four steps, their last iterate, the judgement


@pytest.mark.filterwarnings("ignore:SafePGD. eps")  # next to nothing, on purpose
@pytest.mark.parametrize("engine", ["compile", "cudagraph"])
def test_rows_that_fill_a_batch_have_the_targets_of_their_sample(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With classes alone a batch shrinks, and is filled up."""
    net, x, y = task(24)
    y[:15] = (y[:15] + 1) % 10  # adversarial from the start
    with torch.no_grad():
        clean = net(x)
    use_engine(monkeypatch, engine)
    fast = FastAttackModel(net, dtype=torch.float32)
    sizes: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        samples = torch.cdist(logits.float(), clean).argmin(1)  # so small a budget moves nobody far
        assert torch.equal(labels, y[samples])
        return each_cross_entropy(logits, labels)

    SafePGD(fast, eps=1e-6, steps=3, loss=loss, early_stop=True, generator=seed())(x, y)
    assert 16 in sizes  # nine are left


# What is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_divergence_from_the_clean_output_is_raised(norm: Norm, random_start: bool, dtype: torch.dtype) -> None:
    net, x, _ = task(12)
    clean = clean_of(net, x)
    fast = FastAttackModel(net, dtype=dtype)
    settings: dict[str, Any] = {"eps": EPS[norm], "norm": norm, "random_start": random_start, "loss": divergence}
    found = SafePGD(fast, steps=6, **settings, generator=seed())(x, clean)
    assert_inside(norm, found, x, EPS[norm], (0, 1))
    start = SafePGD(fast, steps=0, **settings, generator=seed())(x, clean)
    with torch.no_grad():
        reached, begun = (divergence(net(z), clean) for z in (found, start))
    assert bool((reached > 3 * begun).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_beside_the_sample_is_inside_and_near(norm: Norm) -> None:
    x = torch.rand(4, 3, 8, 8)
    x[0] = 0.0
    for eps in (0.0, 1e-6, 0.03, 5.0):
        ball = ball_around(norm, x, eps=eps, bounds=(0, 1))
        found = beside(ball, seed())
        assert_inside(norm, ball.finish(found), x, eps, (0, 1))
        assert bool(((found - x).abs() < 6e-3).all())
        assert bool((found != x).any()) == (eps > 0)
    wide = ball_around(norm, x, eps=0.03, bounds=(-math.inf, math.inf))
    assert bool(beside(wide, seed()).isfinite().all())


def test_the_start_is_drawn_from_the_generator() -> None:
    net, x, _ = task(4)
    clean = clean_of(net, x)

    def start(value: int) -> Tensor:
        settings: dict[str, Any] = {"eps": 0.1, "steps": 0, "random_start": False, "restarts": 3, "loss": divergence}
        return SafePGD(net, **settings, generator=seed(value))(x, clean)

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_an_embedding_of_any_shape_is_moved_away() -> None:
    net, x, _ = task(6)
    features = net[:3]  # type: ignore[index]  # (N, 8, H, W)
    with torch.no_grad():
        clean = features(x)

    def distance(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().flatten(1).sum(1)

    for model in (features, FastAttackModel(features, dtype=torch.bfloat16)):
        found = SafePGD(model, eps=0.05, steps=5, loss=distance, generator=seed())(x, clean)
        with torch.no_grad():
            noise = distance(features(x + 0.05 * torch.randn(x.shape, generator=seed()).sign()), clean)
            assert bool((distance(features(found), clean) > 1.5 * noise).all())


class Aside(nn.Module):
    """Logits, a scalar for all samples, and the number of classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return logits, logits.square().mean(), 10


@pytest.mark.parametrize("with_scalar", [False, True])
def test_outputs_may_be_a_tree_of_which_the_loss_uses_some(with_scalar: bool) -> None:
    net, x, _ = task(6)
    clean = clean_of(net, x)

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        logits, scalar, classes = outputs
        assert logits.shape[1] == classes
        return divergence(logits, targets) + (1e-3 * scalar if with_scalar else 0.0)

    found = SafePGD(Aside(net), eps=0.05, steps=4, loss=loss, generator=seed())(x, clean)
    expected = SafePGD(net, eps=0.05, steps=4, loss=divergence, generator=seed())(x, clean)
    with torch.no_grad():
        reached, best = (divergence(net(z), clean) for z in (found, expected))
    assert bool((reached > 0.9 * best).all())


def test_a_loss_far_below_the_range_of_float32_is_climbed_and_one_without_a_gradient_stays() -> None:
    net, x, _ = task(6)
    clean = clean_of(net, x)
    factor = torch.tensor([1.0, 1e-80, 1.0, 1e-80, 0.0, 1.0], dtype=torch.float64)
    spoil = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, math.nan])

    def loss(logits: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        probabilities, scale, spoil = targets
        value = divergence(logits, probabilities) * scale
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient * spoil)
        return value

    found = SafePGD(net, eps=0.05, steps=4, loss=loss, generator=seed())(x, (clean, factor, spoil))
    start = SafePGD(net, eps=0.05, steps=0, loss=divergence, generator=seed())(x, clean)
    assert torch.equal(found[5], start[5])
    expected = SafePGD(net, eps=0.05, steps=4, loss=divergence, generator=seed())(x, clean)
    assert torch.equal(found[:4], expected[:4])


# Classes or not


@pytest.mark.parametrize("classes", [None, True, False])
def test_adversarial_outranks_the_loss_only_with_classes(classes: bool | None) -> None:
    """A loss that is highest at x itself: with classes what is adversarial wins, without x does."""
    net, x, y = task(12)
    with torch.no_grad():
        clean: Tensor = net(x).double()

    def nearness(logits: Tensor, labels: Tensor) -> Tensor:
        assert len(logits) == len(labels) == len(clean)
        return (logits - clean).square().sum(1).neg()

    attack = SafePGD(net, eps=0.3, steps=4, loss=nearness, classes=classes, generator=seed())
    found = attack(x, y)
    moved = (found != x).flatten(1).any(1)
    assert torch.equal(moved, predict(net, found) != y)
    assert bool(moved.any()) == (classes is not False)
    assert ("classes" in repr(attack)) == (classes is not None)


def test_integers_keep_their_dtype_without_classes_and_are_int64_with() -> None:
    net, x, y = task(4)
    seen = set()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.add(labels.dtype)
        return each_cross_entropy(logits, labels.long())

    SafePGD(net, eps=0.1, steps=1, loss=loss, classes=False)(x, y.to(torch.int16))
    assert seen == {torch.int16}
    SafePGD(net, eps=0.1, steps=1, loss=loss)(x, y.to(torch.int16))
    assert seen == {torch.int16, torch.int64}
    SafePGD(net, eps=0.1, steps=1, loss=loss, classes=False)(x, y - 100 + 100)
    SafePGD(net, eps=0.1, steps=1, loss=lambda z, t: z.logsumexp(1), classes=False)(x, y - 100)  # no labels, no limits


NEEDS: list[tuple[dict[str, Any], str]] = [
    ({"loss": divergence, "early_stop": True}, r"early_stop=True, .* no sample can be dropped\. Leave early_stop out"),
    ({"loss": divergence, "targeted": True}, r"targeted=True, .* no class can be reached\. Pass a loss"),
    ({"loss": "ce"}, r"loss='ce', .* it compares logits\. Pass a callable"),
    ({}, r"loss='auto', .* it compares logits\. Pass a callable"),
]


@pytest.mark.parametrize(("settings", "text"), NEEDS)
@pytest.mark.parametrize("make", [lambda c: c, lambda c: (c, c), lambda c: None], ids=["tensor", "tuple", "None"])
def test_what_needs_classes_is_an_error_without_before_any_work(
    make: Callable[[Tensor], Any], settings: dict[str, Any], text: str
) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    net, x, _ = task(4)
    text = f"expected y to hold class labels for {text}"
    attack = SafePGD(nn.Sequential(net, Never()), eps=0.1, steps=1, **settings)
    with pytest.raises(ValueError, match=text):
        attack(x, make(clean_of(net, x)))
    with pytest.raises(ValueError, match=text):
        SafePGD(net, eps=0.1, classes=False, **settings)


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (lambda c: c[:3], ValueError, r"targets with 4 rows, one per sample of x, got shape \(3, 10\) in y\. Pass"),
        (
            lambda c: (c, c[:3, 0]),
            ValueError,
            r"targets with 4 rows, one per sample of x, got shape \(3,\) in y\. Pass",
        ),
        (lambda c: {"a": c.sum()}, ValueError, r"targets with 4 rows, one per sample of x, got shape \(\) in y\. Pass"),
        (lambda c: [c, 0.5], TypeError, r"targets to be tensors, got float in y\. Convert"),
        (lambda c: c.numpy(), TypeError, r"targets to be tensors, got ndarray in y\. Convert"),
        (lambda c: (c, c.to("meta")), ValueError, r"y on cpu, where x is, got meta\. Move it"),
    ],
)
def test_wrong_targets_are_clear_errors(spoil: Callable[[Tensor], Any], kind: type[Exception], text: str) -> None:
    net, x, _ = task(4)
    with pytest.raises(kind, match=f"expected {text}"):
        SafePGD(net, eps=0.1, steps=1, loss=divergence)(x, spoil(clean_of(net, x)))


def test_other_inputs_are_looked_at_all_the_same() -> None:
    net, x, _ = task(4)
    attack, clean = SafePGD(net, eps=0.1, steps=1, loss=divergence), clean_of(net, x)
    for spoilt, text in (
        (x * 300, "x within bounds"),
        (x * math.nan, "x to be finite"),
        (x.long(), "x to be floating"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"expected {text}"):
            attack(spoilt, clean)
    assert attack(x[:0], clean[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("classes", [1, "no"])
def test_classes_are_true_false_or_none(classes: Any) -> None:
    with pytest.raises(TypeError, match=f"expected classes to be True, False or None, got {classes!r}. Pass"):
        SafePGD(nn.Linear(2, 2), eps=0.1, classes=classes)


def test_a_loss_of_another_shape_is_an_error_without_classes_too() -> None:
    net, x, _ = task(4)
    with pytest.raises(ValueError, match=r"one value per sample, shape \(4,\), got \(4, 10\)\. Return"):
        SafePGD(net, eps=0.1, steps=1, loss=lambda z, t: z - t)(x, clean_of(net, x))


# torchattacks


def test_the_attack_of_torchattacks_takes_targets_too() -> None:
    net, x, _ = task(6)
    clean = clean_of(net, x)
    attack = torchattacks.SafePGD(net, eps=0.05, steps=4, loss=divergence, random_start=False)
    for y, loss in ((clean, divergence), ((clean, None), lambda z, t: divergence(z, t[0]))):
        attack.loss = loss
        found = attack(x, y)
        with torch.no_grad():
            assert bool((divergence(net(found), clean) > 5e-4).all())
    attack.loss = lambda z, t: z.logsumexp(1)
    assert not torch.equal(attack(x), x)
    attack.set_mode_targeted_by_label()
    with pytest.raises(ValueError, match="class labels for targeted=True"):
        attack(x, clean)
    with pytest.raises(ValueError, match="class labels for early_stop=True"):
        torchattacks.SafePGD(net, loss=divergence, classes=False, early_stop=True)
