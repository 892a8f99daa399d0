"""`accelerate` of foolbox attacks: the same attack, on a fast copy of whatever model it is called with."""

import copy
import gc
import pickle
import weakref
from typing import Any, cast

import eagerpy as ep
import foolbox as fb
import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel, SafeLinfPGD, accelerate
from fastadv_adapters.networks import Kind, Schedule
from tests.support.tools import attackable_net, batch

A = fb.attacks
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "axis": -3}


class Made:
    """The fast models that are made meanwhile, and the dtypes and decisions of the calls that they get."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.calls = 0, set[tuple[Any, ...]]()
        make, run = FastAttackModel.__init__, FastAttackModel._run

        def counted(fast: FastAttackModel, *args: Any, **kwargs: Any) -> None:
            self.count += 1
            make(fast, *args, **kwargs)

        def recorded(fast: FastAttackModel, arguments: Any) -> Any:
            self.calls.add((fast.dtype, fast._decisions, fast._logits_dtype))
            return run(fast, arguments)

        patch.setattr(FastAttackModel, "__init__", counted)
        patch.setattr(FastAttackModel, "_run", recorded)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    net, (x, _) = attackable_net(), batch(6)
    return net, x, net(x).argmax(1)


def plain(net: nn.Module, **settings: Any) -> fb.PyTorchModel:
    return fb.PyTorchModel(net, (0, 1), **settings)


@pytest.mark.parametrize("wrapper", [False, True])
def test_bounds_preprocessing_and_wrappers_stay(wrapper: bool, problem: Any, made: Made) -> None:
    net, x, y = problem
    model = plain(net, preprocessing=PREPROCESSING).transform_bounds((-1, 3), wrapper=wrapper)
    attack = A.LinfPGD(steps=5, rel_stepsize=0.3, random_start=False)
    expected = attack(plain(copy.deepcopy(net), preprocessing=PREPROCESSING), x, y, epsilons=0.02)
    found = accelerate(attack, dtype=torch.float32)(model, 4 * x - 1, y, epsilons=0.08)
    assert made.count == 1
    torch.testing.assert_close((found[1] + 1) / 4, expected[1], rtol=0, atol=1e-4)
    assert torch.equal(found[2], expected[2])


def test_one_copy_is_made_per_model_and_follows_it(problem: Any, made: Made) -> None:
    net, x, y = problem
    model = plain(net)
    pgd, ddn = accelerate(A.LinfPGD(steps=2)), accelerate(A.DDNAttack(steps=2))
    for attack, epsilon in ((pgd, 0.01), (ddn, None), (pgd, 0.02)):
        attack(model, x, y, epsilons=epsilon)
    pgd(model.transform_bounds((0, 2)), 2 * x, y, epsilons=0.01)
    assert made.count == 1
    with torch.no_grad():
        net[-1].bias.add_(torch.arange(10.0) * 100)
    raw, _, success = ddn(model, x, net(x).argmax(1), epsilons=None)
    assert made.count == 1
    assert torch.equal(net(raw).argmax(1) != net(x).argmax(1), success)
    accelerate(A.LinfPGD(steps=2), fuse_bn=False)(model, x, y, epsilons=0.01)
    pgd(plain(net), x, y, epsilons=0.01)
    assert made.count == 3, "other options, and another foolbox model"


def test_the_copy_is_freed_with_its_model() -> None:
    net, (x, _) = attackable_net(), batch(2)
    attack, model = accelerate(A.LinfPGD(steps=2)), plain(net)
    attack(model, x, net(x).argmax(1), epsilons=0.01)
    seen = weakref.ref(net)
    del net, model
    gc.collect()
    assert seen() is None
    assert repr(attack)


@pytest.mark.parametrize(
    ("attack", "options", "expected"),
    [
        (A.DDNAttack(steps=2), {}, ("exact", torch.float64)),
        (A.L2DeepFoolAttack(steps=2), {}, ("exact", torch.float32)),
        (A.VirtualAdversarialAttack(steps=1), {}, ("exact", torch.float32)),
        (A.LinfPGD(steps=2), {}, ("auto", torch.float64)),
        (SafeLinfPGD(steps=2), {}, ("auto", torch.float32)),
        (A.LinfRepeatedAdditiveUniformNoiseAttack(repeats=2), {}, ("auto", torch.float32)),
        (A.LinfPGD(steps=2), {"logits_dtype": torch.float32}, ("auto", torch.float32)),
        (A.DDNAttack(steps=2), {"decisions": "fast"}, ("fast", torch.float64)),
    ],
)
def test_each_attack_gets_the_view_that_suits_it(
    attack: Any, options: Any, expected: Any, problem: Any, made: Made
) -> None:
    net, x, y = problem
    accelerate(attack, dtype=torch.bfloat16, **options)(plain(net), x, y, epsilons=0.02)
    assert made.calls == {(torch.bfloat16, *expected)}


def test_the_given_attack_stays_and_the_new_one_is_of_its_kind(problem: Any, made: Made) -> None:
    net, x, y = problem
    attack = A.L2DeepFoolAttack(steps=3)
    fast = accelerate(attack)
    assert isinstance(fast, A.L2DeepFoolAttack)
    assert (type(attack), fast.steps) == (A.L2DeepFoolAttack, 3)
    assert repr(fast) == f"Fast{attack!r}"
    assert accelerate(fast) is fast
    attack(plain(net), x, y, epsilons=None)
    assert made.count == 0


@pytest.mark.parametrize(
    "derive",
    [
        lambda a: accelerate(a).repeat(2),
        lambda a: accelerate(a.repeat(2)),
        lambda a: accelerate(a.repeat(2)).repeat(2),
        lambda a: pickle.loads(pickle.dumps(accelerate(a))),
        lambda a: copy.deepcopy(accelerate(a).repeat(2)),
        lambda a: copy.copy(accelerate(a)),
        lambda a: A.L2FMNAttack(steps=1, init_attack=accelerate(a)),
        lambda a: accelerate(A.L2FMNAttack(steps=1, init_attack=accelerate(a))),
    ],
)
def test_what_is_made_of_an_accelerated_attack_is_fast_too(derive: Any, problem: Any, made: Made) -> None:
    net, x, y = problem
    derive(A.L2DeepFoolAttack(steps=20))(plain(net), x, y, epsilons=None)
    assert made.count == 1


def test_a_model_that_is_fast_keeps_its_options(problem: Any, made: Made) -> None:
    net, x, y = problem
    fast = FastAttackModel(net, dtype=torch.bfloat16, logits_dtype=torch.float32)
    for model in (
        FastPyTorchModel(fast, (0, 1)),
        plain(fast, device=fast.device),
        FastPyTorchModel(fast, (0, 1)).transform_bounds((0, 1), wrapper=True),
    ):
        accelerate(A.LinfPGD(steps=2))(model, x, y, epsilons=0.01)
        with pytest.raises(ValueError, match=r"expected no options for an attack on a model that is fast .*got dtype"):
            accelerate(A.LinfPGD(steps=2), dtype=torch.float32)(model, x, y, epsilons=0.01)
    assert made.count == 1
    assert made.calls == {(torch.bfloat16, "auto", torch.float32)}


class Spoilt(nn.Module):
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


def test_what_an_accelerated_attack_is_fed_is_not_fed_to_the_given_one(problem: Any) -> None:
    net, x, _ = problem
    given = A.DatasetAttack()
    fast = accelerate(given)
    fast.feed(plain(net), ep.astensor(x))
    assert (len(fast.raw_inputs), len(given.raw_inputs)) == (1, 0)
    given.feed(plain(net), ep.astensor(x))
    assert (len(fast.raw_inputs), len(given.raw_inputs)) == (1, 1)


@pytest.mark.parametrize("wrapper", [False, True])
def test_accelerated_safe_attacks_still_rescue(wrapper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Schedule, "is_losing", lambda *_, **__: False)  # else float32 serves them soon
    monkeypatch.setattr(Kind, "loses_more", lambda *_: False)  # as on CUDA, where they are not run again at once
    net, (x, _) = Spoilt().eval(), batch(6)
    model: Any = plain(net)
    model = model.transform_bounds((0, 1), wrapper=True) if wrapper else model
    attack = SafeLinfPGD(steps=20, random_start=False)
    _, _, success = accelerate(attack, dtype=torch.float16)(model, x, net(x).argmax(1), epsilons=0.1)
    assert success.all()
    unsafe = accelerate(fb.attacks.LinfPGD(steps=20, random_start=False), dtype=torch.float16)
    assert not unsafe(model, x, net(x).argmax(1), epsilons=0.1)[2][-1], "the sample stands still without the rescue"


class Elsewhere(fb.models.Model):
    """A wrapper that keeps its model where nobody can know it."""

    bounds = fb.types.Bounds(0, 1)

    def __init__(self, model: fb.models.Model) -> None:
        self.inside = model

    def __call__(self, inputs: Any) -> Any:
        return self.inside(inputs)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: accelerate(m), TypeError, "expected a foolbox attack, got Sequential: make the attack first"),
        (lambda m: accelerate(cast(Any, A.LinfPGD)), TypeError, "expected a foolbox attack, got ABCMeta"),
        (lambda m: accelerate(A.LinfPGD(), **cast(Any, {"fuse": True})), TypeError, "options of .*, got fuse: check"),
        (
            lambda m: accelerate(accelerate(A.LinfPGD()), fuse_bn=False),
            ValueError,
            "no options for an attack that is accelerated already, got fuse_bn: accelerate the attack",
        ),
        (lambda m: accelerate(A.LinfPGD(), **cast(Any, {"dtype": torch.int8})), ValueError, "expected dtype to be"),
        (lambda m: accelerate(A.LinfPGD(), **cast(Any, {"engine": ""})), ValueError, "expected engine to be one of"),
        (lambda m: run_on(m), TypeError, "expected a foolbox.PyTorchModel, or a wrapper .*, got Sequential"),
        (lambda m: run_on(Elsewhere(plain(m))), TypeError, "wrapper with one in its _model, got Elsewhere: make one"),
        (lambda m: run_on(plain(m), dtype=torch.int8), ValueError, "expected dtype to be"),
    ],
)
def test_wrong_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(attackable_net())


def run_on(model: Any, **options: Any) -> None:
    x, y = batch(2)
    accelerate(A.LinfPGD(steps=1), **options)(model, x, y, epsilons=0.1)
