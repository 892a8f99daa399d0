"""Lists of parameters, averages, optimizers and classes: steps of training need no new networks, and are followed."""

import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.modules import held_by

FLOAT32: Any = {"dtype": torch.float32}


def images(n: int = 8) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]


class Net(nn.Module):
    """Keeps what ``keep`` gives of it, and may add a number that it finds there."""

    def __init__(self, keep: Callable[["Net"], Any], read: Callable[[Any], Any] = lambda kept: 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(32, 10)
        self.read = read
        self.kept = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).relu().flatten(1)) * (1 + self.read(self.kept))
        return out


class Average:
    """An exponential moving average in a dictionary, as many training scripts keep it; written in place."""

    def __init__(self, net: nn.Module) -> None:
        self.parameters = list(net.parameters())
        self.shadow = {name: p.detach().clone() for name, p in net.named_parameters()}

    def update(self) -> None:
        for mean, p in zip(self.shadow.values(), self.parameters, strict=True):
            mean.mul_(0.9).add_(p.detach(), alpha=0.1)


@dataclass
class Groups:
    decayed: list[nn.Parameter] = field(default_factory=list)
    by_name: dict[str, Any] = field(default_factory=dict)


def groups(net: nn.Module) -> Groups:
    return Groups(list(net.parameters()), {"all": {name: (p,) for name, p in net.named_parameters()}})


def adam(net: nn.Module) -> Any:
    return {"optimizers": [torch.optim.Adam(net.parameters())], "scaler": torch.amp.GradScaler("cpu", enabled=False)}


KEPT: dict[str, tuple[Callable[[Net], Any], Callable[[Any], Any]]] = {
    "list": (lambda net: [p for p in net.parameters() if p.ndim > 1], lambda kept: kept[0].mean()),
    "tuple": (lambda net: tuple(net.parameters()), lambda kept: kept[1].mean()),
    "dictionary": (lambda net: dict(net.named_parameters()), lambda kept: kept["conv.weight"].mean()),
    "buffers": (lambda net: dict(net.named_buffers()), lambda kept: kept["norm.running_mean"].mean()),
    "data-class": (groups, lambda kept: kept.by_name["all"]["head.weight"][0].mean()),
    "average": (Average, lambda kept: kept.shadow["head.weight"].mean() + kept.parameters[0].mean()),
    "optimizer": (lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), lambda kept: 0.0),
    "optimizers": (adam, lambda kept: 0.0),
    "schedule": (
        lambda net: torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(net.parameters(), 0.1), 9),
        lambda kept: 0.0,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize(("keep", "read"), KEPT.values(), ids=KEPT.keys())
def test_steps_are_followed_in_place_whatever_the_model_keeps(
    keep: Any, read: Any, auto_update: bool, dtype: torch.dtype
) -> None:
    net, x, y = Net(keep, read), images(), torch.arange(8)
    fast = FastAttackModel(net, dtype=dtype, auto_update=auto_update)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    gradient(fast, x)
    network, optimizer = fast._networks.folded.network, torch.optim.SGD(net.parameters(), 0.2)
    for _ in range(3):
        before = gradient(fast, x)
        net.train()
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if isinstance(net.kept, torch.optim.lr_scheduler.LRScheduler):
            net.kept.optimizer.step()
        kept = list(net.kept.values()) if isinstance(net.kept, dict) else [net.kept]
        for thing in [t for k in kept for t in (k if isinstance(k, list) else [k])]:
            for name in ("step", "update"):
                if hasattr(thing, name) and not isinstance(thing, (Tensor, torch.amp.GradScaler)):
                    getattr(thing, name)()
        net.eval()
        if not auto_update:
            torch.testing.assert_close(gradient(fast, x), before)
            fast.update()
        wanted = gradient(net, x)
        sizes = wanted.flatten(1).norm(dim=1)
        now, then = ((found - wanted).flatten(1).norm(dim=1) / sizes for found in (gradient(fast, x), before))
        assert now.median() < tolerance, "a ReLU of one or two samples may flip on rounding"
        assert then.median() > 3 * tolerance, "the step must be seen"
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x))
        assert fast._networks.folded.network is network


def exchanged(net: Any) -> None:
    net.conv.weight.data = net.conv.weight.data * 2


def replaced(net: Any) -> None:
    net.conv.weight = nn.Parameter(net.conv.weight.detach() * 2)


def replaced_in_the_list(net: Any) -> None:
    net.kept[0] = torch.ones(8)


def exchanged_in_the_list(net: Any) -> None:
    net.kept[-1].data = torch.full((5, 3), 3.0)


@pytest.mark.parametrize("change", [exchanged, replaced, replaced_in_the_list, exchanged_in_the_list])
def test_what_a_list_holds_is_right_after_deeper_changes(change: Callable[[nn.Module], None]) -> None:
    net = Net(lambda net: [*net.parameters(), torch.ones(3)], lambda kept: sum(p.mean() for p in kept))
    net.eval()
    fast, x = FastAttackModel(net, **FLOAT32), images()
    for _ in range(2):
        torch.testing.assert_close(gradient(fast, x), gradient(net, x))
        change(net)
    torch.testing.assert_close(gradient(fast, x), gradient(net, x))


# --- what a process has one of ---------------------------------------------------------------------------------------


class Entry:
    number = 0


def logs() -> dict[str, Any]:
    log = logging.getLogger("fastadv-tests")
    log.propagate = False
    return {"log": log, "adapter": logging.LoggerAdapter(log, {}), "handler": logging.NullHandler()}


@pytest.mark.parametrize("name", ["log", "adapter", "handler"])
def test_what_a_process_has_one_of_is_not_looked_at(name: str) -> None:
    kept = logs()[name]
    net, x = Net(lambda net: {"kept": [kept]}).eval(), images()
    fast = FastAttackModel(net, **FLOAT32)
    gradient(fast, x)
    networks = fast._networks
    updates, network = networks.updates, networks.folded.network
    for number in range(3):
        logging.getLogger(f"fastadv-tests.others.{number}").warning("a message is noted in caches of levels")
        torch.testing.assert_close(gradient(fast, x), gradient(net, x))
    assert networks.updates == updates
    assert networks.folded.network is network
    assert not [held for held in held_by(net, set(map(id, net.modules()))) if isinstance(held, logging.Filterer)]


class SharedSettings:
    """Copied as itself, too, but a pass reads it."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedSettings":
        return self


class CopiedSettings(SharedSettings):
    """Has objects inside, and a copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Entry()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiedSettings":
        made = type(self)()
        vars(made).update(vars(self))
        return made


@pytest.mark.parametrize("make", [SharedSettings, CopiedSettings])
def test_settings_are_looked_at_however_they_are_copied(make: Any) -> None:
    net, x = Net(lambda net: make(), lambda kept: kept.scale).eval(), images()
    fast = FastAttackModel(net, **FLOAT32)
    gradient(fast, x)
    updates = fast._networks.updates
    net.kept.scale = 3.0
    torch.testing.assert_close(gradient(fast, x), gradient(net, x))
    assert fast._networks.updates == updates + 1


# --- classes ----------------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Halved(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(("name", "kind"), [("head", Doubled), ("norm", Shifted), ("", Halved)])
def test_a_changed_class_is_a_changed_model(name: str, kind: type) -> None:
    net = Net(lambda net: None).eval()
    fast, x = FastAttackModel(net, **FLOAT32), images()
    before = gradient(fast, x)
    net.get_submodule(name).__class__ = kind
    torch.testing.assert_close(gradient(fast, x), gradient(net, x))
    assert not torch.allclose(gradient(fast, x), before)
    net.get_submodule(name).__class__ = kind.__mro__[1]
    torch.testing.assert_close(gradient(fast, x), before)


def test_a_forward_put_into_the_class_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.BatchNorm2d):
        pass

    net = Net(lambda net: None).eval()
    net.norm.__class__ = Own
    fast, x = FastAttackModel(net, **FLOAT32), images()
    before = gradient(fast, x)
    monkeypatch.setattr(Own, "forward", lambda self, input: nn.BatchNorm2d.forward(self, input) * 3, raising=False)
    torch.testing.assert_close(gradient(fast, x), gradient(net, x))
    assert not torch.allclose(gradient(fast, x), before)


def test_a_forward_put_on_the_instance_is_noticed() -> None:
    net: Any = Net(lambda net: None).eval()
    fast, x = FastAttackModel(net, **FLOAT32), images()
    before = gradient(fast, x)
    for part in (net.norm, net.conv, net.head, net):
        part.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), part)
        torch.testing.assert_close(gradient(fast, x), gradient(net, x))
    for part in (net.norm, net.conv, net.head, net):
        del part.forward
    torch.testing.assert_close(gradient(fast, x), before)
