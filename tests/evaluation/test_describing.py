"""An evaluation goes on with the same attacks only: code, closures and surrogates tell them apart, in any process."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import copy_of
from fastadv_adapters.evaluation.libraries import Function, Torchattack
from fastadv_adapters.evaluation.safe import Safe
from tests.evaluation.runs import EPS, data, evaluated, net
from tests.support.tools import attackable_net

SCALE, COUNTED = 1.0, 0


def made(body: str, **outside: Any) -> Callable[..., Any]:
    """A function ``attack(x, y)`` as another version of a script would have it."""
    places: dict[str, Any] = {"torch": torch, "functools": functools, "__name__": "script", **outside}
    exec(body, places)
    return places["attack"]  # type: ignore[no-any-return]


def closed(value: Any) -> Callable[..., Tensor]:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        return x + value * 0  # type: ignore[no-any-return]

    return attack


def defaulted(value: float) -> Callable[..., Tensor]:
    def attack(x: Tensor, y: Tensor, *, size: float = value) -> Tensor:
        return x + size

    return attack


def other_net() -> nn.Module:
    other = attackable_net()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    return other


class Holder:
    def __init__(self, size: Any) -> None:
        self._size, self.calls = size, 0

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return x + self._size  # type: ignore[no-any-return]


class Shifts(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.size


PAIRS: dict[str, tuple[Any, Any]] = {
    "a constant": (lambda x, y: x + 0.1, lambda x, y: x + 0.2),
    "an operator": (lambda x, y: x.sign(), lambda x, y: x.abs()),
    "code inside": (
        made("def attack(x, y):\n    return [(lambda v: v + 1)(v) for v in (x, y)]"),
        made("def attack(x, y):\n    return [(lambda v: v + 2)(v) for v in (x, y)]"),
    ),
    "a global": (made("def attack(x, y):\n    return x + A", A=1), made("def attack(x, y):\n    return x + A", A=2)),
    "a helper": (
        made("def step(x):\n    return x + 1\ndef attack(x, y):\n    return step(x)"),
        made("def step(x):\n    return x + 2\ndef attack(x, y):\n    return step(x)"),
    ),
    "a decorated helper": (
        made("@torch.no_grad()\ndef step(x):\n    return x + 1\ndef attack(x, y):\n    return step(x)"),
        made("@torch.no_grad()\ndef step(x):\n    return x + 2\ndef attack(x, y):\n    return step(x)"),
    ),
    "a closure": (closed(0.1), closed(0.2)),
    "a closure over a tensor": (closed(torch.zeros(3)), closed(torch.ones(3))),
    "a closure over a tuple": (closed((1, "a")), closed((1, "b"))),
    "a closure over a model": (closed(net()), closed(other_net())),
    "a closure over models": (closed([net(), net()]), closed([net(), other_net()])),
    "a closure over a function": (closed(closed(1)), closed(closed(2))),
    "a closure over an attack": (
        closed(torchattacks.PGD(net(), eps=0.1)),
        closed(torchattacks.PGD(net(), eps=0.2)),
    ),
    "a closure over a sparse tensor": (closed(torch.eye(3).to_sparse()), closed((2 * torch.eye(3)).to_sparse())),
    "a default": (defaulted(0.1), defaulted(0.2)),
    "a partial of a tensor": (
        functools.partial(Holder.attack, Holder(torch.zeros(1))),
        functools.partial(Holder.attack, Holder(torch.ones(1))),
    ),
    "a bound method": (Holder(0.1).attack, Holder(0.2).attack),
    "a module": (Shifts(0.1), Shifts(0.2)),
    "the class of an object": (
        made("class A:\n    def __call__(self, x, y):\n        return self.step(x)\n    def step(self, x):\n"
             "        return x + 1\nattack = A()"),
        made("class A:\n    def __call__(self, x, y):\n        return self.step(x)\n    def step(self, x):\n"
             "        return x + 2\nattack = A()"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_attacks_that_differ_are_described_otherwise(name: str) -> None:
    one, other = (Function("a", attack).description for attack in PAIRS[name])
    assert one != other
    assert " at 0x" not in one + other


def test_a_loss_of_ones_own_is_described_with_its_code_and_settings_without_any() -> None:
    plain = Safe("a", {"alpha": 0.1, "steps": 3, "loss": "ce"}).description
    assert plain == "SafePGD(alpha=0.1, steps=3, loss='ce', targeted=False)"
    losses = [lambda outputs, y: outputs.sum(), lambda outputs, y: outputs.mean()]
    assert len({Safe("a", {"loss": loss}).description for loss in losses}) == 2


SAME: dict[str, tuple[Any, Any]] = {
    "a closure": (closed(0.1), closed(0.1)),
    "a closure over what was found": (closed([1]), closed([1, 2])),
    "a closure over a model": (closed(net()), closed(FastAttackModel(attackable_net(), dtype=torch.float32))),
    "a bound method": (Holder(0.1).attack, Holder(0.1).attack),
    "a place": (
        made("def attack(x, y):\n    return x.to(device)", device="cuda:0"),
        made("def attack(x, y):\n    return x.to(device)", device="cuda:1"),
    ),
    "a line below": (
        made("def attack(x, y):\n    return x"),
        made("\n\ndef attack(x, y):\n    # so it is\n    return x"),
    ),
    "a count": (
        made("n = 0\ndef attack(x, y):\n    global n\n    n += 1\n    return x"),
        made("n = 5\ndef attack(x, y):\n    global n\n    n += 1\n    return x"),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_attacks_that_are_the_same_are_described_likewise(name: str) -> None:
    one, other = (Function("a", attack).description for attack in SAME[name])
    assert one == other


SCRIPT = """
import torch
from fastadv_adapters.evaluation.libraries import Function
names, mean = frozenset({"a", "b", "c", "d"}), torch.ones(3)
def attack(x, y, kinds=frozenset({"u", "v", "w"})):
    return x + (1 if "q" in {"q", "r", "s", "t"} else 2) + len(names) + mean
print(Function("a", attack).description)
"""


def test_the_description_is_the_same_in_every_process() -> None:
    said = set()
    for number in ("1", "2", "3"):
        here = {**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": str(Path(__file__).parents[2])}
        said.add(
            subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=here).stdout
        )
    assert len(said) == 1


class Own(torchattacks.FGSM):  # type: ignore[misc]
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images


class Changed(torchattacks.FGSM):  # type: ignore[misc]
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images + 0.001


def test_attacks_that_were_put_into_a_multiattack_later_are_copied_on_their_models() -> None:
    model, other = net(), attackable_net()
    multi = torchattacks.MultiAttack([torchattacks.FGSM(model), torchattacks.FGSM(model)])
    multi.attacks.append(torchattacks.PGD(other))
    copied = copy_of(multi)
    assert copied.attacks[2] is not multi.attacks[2]
    assert [part.model for part in copied.attacks] == [model, model, other]


def test_the_code_of_an_attack_class_of_ones_own_counts() -> None:
    Changed.__name__ = Changed.__qualname__ = "Own"
    one, other = (Torchattack("a", kind(net())).description for kind in (Own, Changed))
    assert one != other
    assert "#" not in Torchattack("a", torchattacks.FGSM(net())).description


def test_an_evaluation_goes_on_with_the_same_surrogate_only(tmp_path: Path) -> None:
    given = data(8)
    first = evaluated(given, torchattacks.FGSM(other_net(), eps=EPS), output=tmp_path)
    assert evaluated(given, torchattacks.FGSM(other_net(), eps=EPS), output=tmp_path).samples == first.samples
    for model in (net(), attackable_net()):
        with pytest.raises(ValueError, match="to have the same settings attacks FGSM, got"):
            evaluated(given, torchattacks.FGSM(model, eps=EPS), output=tmp_path)


def test_notes_need_not_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated(data(8), output=tmp_path)
    monkeypatch.setattr("fastadv_adapters.evaluation.planning.doubt_images", lambda x, bounds: "worded otherwise")
    assert evaluated(data(8), output=tmp_path).samples == first.samples


def by_name(net: Any, x: Tensor, y: Any = None) -> Tensor:
    return x + 0 * net(x).sum()  # type: ignore[no-any-return]


def with_budget(model: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return x


def with_keyword(x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return x


def without_labels(model: Any, x: Tensor) -> Tensor:
    return x


class Module(nn.Module):
    def forward(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        return by_name(model, x, y)


@pytest.mark.parametrize("attack", [by_name, Module(), functools.partial(by_name), lambda f, x, y=None: by_name(f, x)])
def test_a_model_is_given_to_what_asks_for_it_by_name(attack: Any) -> None:
    report = evaluated(data(8), attack)
    assert report.robust_accuracy == report.clean_accuracy
    assert all(row.forward is not None for row in report.samples)


@pytest.mark.parametrize("attack", [with_budget, with_keyword, without_labels, functools.partial(by_name, net=net())])
def test_callables_that_need_other_arguments_are_refused_early(attack: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a callable \(model, x, y\) or \(x, y\) in attacks, got .*partial"):
        evaluated(data(8), attack, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
