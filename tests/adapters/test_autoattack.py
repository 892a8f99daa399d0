"""The reference AutoAttack on fast models: its versions, log, checks and state, judged by the plain model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from digits import accuracy, grey_digits, trained_net
from fastadv_adapters import FastAttackModel
from fastadv_adapters.autoattack import ATTACKS, accelerate
from tests.support.tools import attackable_net, batch

pytestmark = pytest.mark.usefixtures("untouched")
FLOAT32: Any = {"dtype": torch.float32}
BUDGETS = {"Linf": 0.01, "L2": 0.1, "L1": 0.5}


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    net, (x, _) = attackable_net(), batch(8)
    return net, x, net(x).argmax(1)


def adversary(model: Any, *, norm: Any = "Linf", steps: int = 3, seed: int = 0, **settings: Any) -> Any:
    """An AutoAttack with few steps."""
    made = AutoAttack(model, norm=norm, eps=settings.pop("eps", BUDGETS[norm]), seed=seed, **settings)
    for attack in (made.apgd, made.apgd_targeted, made.fab):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_restarts = min(attack.n_restarts, 2)
        attack.n_target_classes = min(getattr(attack, "n_target_classes", 9), 4)
    made.apgd.eot_iter = min(made.apgd.eot_iter, 3)
    made.square.n_queries = 10 * steps
    return made


def run(made: Any, x: Tensor, y: Tensor, **settings: Any) -> tuple[int, list[str]]:
    """How many images stand, and what was logged, without seconds."""
    logger, told = logging.getLogger("auto-attack"), Told()
    logger.addHandler(told)
    logger.setLevel(logging.DEBUG)
    try:
        found, classes = made.run_standard_evaluation(x, y, **settings)
    finally:
        logger.removeHandler(told)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    return int((classes == y).sum()), told.texts


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage().split(' (total')[0]}")


def as_it_is(made: Any) -> Any:
    return made


def half(made: Any) -> Any:
    return accelerate(made, dtype=torch.bfloat16)


def warnings_in(log: list[str]) -> list[str]:
    return [text for text in log if text.startswith("WARNING")]


def attacks_in(log: list[str]) -> list[str]:
    return [text.split(":")[0] for text in log if "robust accuracy after" in text]


def test_each_attack_gets_the_view_that_suits_it_and_the_plain_model_judges() -> None:
    net = attackable_net()
    made = adversary(net)
    assert accelerate(made, **FLOAT32) is made
    views = {name: getattr(getattr(made, name), place) for name, place in ATTACKS.items()}
    assert {name: (v._decisions, v._logits_dtype) for name, v in views.items()} == {
        "apgd": ("auto", torch.float64),
        "apgd_targeted": ("auto", torch.float64),
        "fab": ("exact", torch.float32),
        "square": ("auto", torch.float32),
    }
    assert made.model is net
    assert len({id(view._networks) for view in views.values()}) == 1
    chosen = accelerate(adversary(net), decisions="fast", logits_dtype=torch.float32, **FLOAT32)
    assert {(chosen.fab.predict._decisions, chosen.apgd.model._logits_dtype)} == {("fast", torch.float32)}


CASES: dict[str, dict[str, Any]] = {
    "standard": {"version": "standard"},
    "standard in L2": {"version": "standard", "norm": "L2"},
    "standard in L1": {"version": "standard", "norm": "L1"},
    "plus": {"version": "plus"},
    "rand": {"version": "rand"},
    "custom": {"version": "custom", "attacks": ["apgd-dlr", "fab"]},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_version_is_as_strong_and_logs_the_same(case: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    plain, log = run(adversary(net, **CASES[case]), x, y, batch_size=5)
    assert plain < len(x) - 1, "or an attack that does nothing would pass"
    made = accelerate(adversary(net, **CASES[case]), dtype=torch.bfloat16)
    robust, fast_log = run(made, x, y, batch_size=5)
    assert abs(robust - plain) <= 1
    assert warnings_in(fast_log) == warnings_in(log)
    assert attacks_in(fast_log) == attacks_in(log)
    assert fast_log[-1] == f"DEBUG robust accuracy: {robust / len(x):.2%}"


@pytest.mark.long
def test_on_the_digits_robust_accuracy_is_that_of_the_plain_model() -> None:
    data = grey_digits(test_size=100)
    net, x, y = trained_net(data, width=6, epochs=2), data.test_images, data.test_labels
    shares = []
    for ready in (as_it_is, half):
        made = ready(adversary(net, eps=0.05, steps=5))
        found, classes = made.run_standard_evaluation(x, y)
        shares.append(accuracy(net, found, y))
        assert float((classes == y).float().mean()) == pytest.approx(shares[-1])
    assert 0.1 < shares[0] < 0.9, "the test needs images that fall and images that stand"
    assert abs(shares[0] - shares[1]) <= 0.01 + 1e-6


class Randomised(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))  # type: ignore[no-any-return]


DEFENCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "randomized": Randomised,
    "probability distribution": lambda net: nn.Sequential(net, nn.Softmax(1)),
}


@pytest.mark.parametrize("text", DEFENCES)
def test_checks_of_the_defence_look_at_the_plain_model(text: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = DEFENCES[text](problem[0]).eval(), *problem[1:]
    settings: dict[str, Any] = {"version": "custom", "attacks": ["apgd-ce"]}
    warnings = []
    for made in (adversary(net, **settings), accelerate(adversary(net, **settings), **FLOAT32)):
        warnings.append(warnings_in(run(made, x, y)[1]))
    assert len(warnings[0]) == 1
    assert text in warnings[0][0]
    assert warnings[1] == warnings[0]


def test_the_state_is_written_as_ever(problem: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    net, x, y = problem
    states = []
    for name, ready in {"plain": as_it_is, "fast": half}.items():
        path = tmp_path / name
        stopped = ready(adversary(net))
        stopped.fab.perturb = None
        with pytest.raises(TypeError, match="not callable"):
            stopped.run_standard_evaluation(x, y, state_path=path)
        states.append(json.loads(path.read_text()))
        with pytest.raises(ValueError, match="different set of attacks"):  # as 0.2.0 says of any state
            stopped.run_standard_evaluation(x, y, state_path=path)
    plain, fast = ([state[key] for key in ("_robust_flags", "_clean_accuracy", "_run_attacks")] for state in states)
    assert fast == plain
    assert 0 < sum(states[1]["_robust_flags"]) < len(x)


def test_a_seed_repeats_it(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    first, again = (accelerate(adversary(net), **FLOAT32).run_standard_evaluation(x, y)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_each_attack_runs_alone(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    names = ["apgd-ce", "fab"]
    made = accelerate(adversary(net, version="custom", attacks=names), **FLOAT32)
    assert list(made.run_standard_evaluation_individual(x, y)) == names


def test_an_adversary_of_the_package_that_it_stems_from(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net = problem[0]
    of_pyautoattack = adversary(net)
    original = SimpleNamespace(model=net, **{name: getattr(of_pyautoattack, name) for name in ATTACKS})
    assert accelerate(original, **FLOAT32).apgd.model.wrapped is net


def test_one_on_a_fast_model_stays_as_it_is(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = problem
    fast = FastAttackModel(net, **FLOAT32)
    made = adversary(fast)
    assert accelerate(made).fab.predict is fast
    run(made, x, y)
    with pytest.raises(ValueError, match="a model that is fast already, got dtype"):
        accelerate(made, dtype=torch.float32)
    twice = accelerate(accelerate(adversary(net), **FLOAT32))
    assert twice.fab.predict._decisions == "exact"


def test_what_cannot_be_accelerated_is_refused_and_left_as_it_was(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    net = problem[0]
    with pytest.raises(TypeError, match="expected an AutoAttack of pyautoattack or autoattack, got Sequential"):
        accelerate(net)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        accelerate(adversary(lambda x: net(x)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        accelerate(adversary(net), speed=11)  # type: ignore[call-arg]
    made = adversary(net)
    made.square.predict = nn.Sequential(attackable_net()).train()
    with pytest.raises(RuntimeError, match="expected an attack on the model in eval mode, got AutoAttack on one in"):
        accelerate(made)
    assert made.apgd.model is made.fab.predict is net
