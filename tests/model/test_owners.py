"""Modules that own fast models of themselves, attacks and optimizers; and weights meant for the wrapped model."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.torchattacks import accelerate

FLOAT32: Any = {"dtype": torch.float32}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).eval()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]


class Owner(nn.Module):
    """As a module of a training framework, which attacks itself in its training step."""

    def __init__(self, own: Callable[["Owner"], Any]) -> None:
        super().__init__()
        self.net = small()
        self.owned = own(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * 2
        return out


def fast_of(owner: nn.Module) -> FastAttackModel:
    return FastAttackModel(owner, **FLOAT32)


OWNED: dict[str, Callable[[Owner], Any]] = {
    "fast": fast_of,
    "fast-part": lambda owner: fast_of(owner.net),
    "fasts": lambda owner: [fast_of(owner), {"part": fast_of(owner.net)}],
    "module-list": lambda owner: nn.ModuleList([fast_of(owner), fast_of(owner.net)]),
    "SafePGD": lambda owner: SafePGD(owner, eps=0.1, steps=2, generator=torch.Generator()),
    "SafePGD-fast": lambda owner: SafePGD(fast_of(owner), eps=0.1, steps=2),
    "torchattacks": lambda owner: torchattacks.PGD(owner, steps=2),
    "torchattacks-fast": lambda owner: torchattacks.PGD(fast_of(owner), steps=2),
    "accelerated": lambda owner: accelerate(torchattacks.PGD(owner, steps=2), **FLOAT32),
    "foolbox": lambda owner: FastPyTorchModel(fast_of(owner), bounds=(0, 1)),
    "optimizer": lambda owner: torch.optim.Adam(owner.parameters()),
    "scheduled": lambda owner: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(owner.parameters(), 0.1), 1),
}


class Trainer:
    """Counts, and refers to its module, as that of Lightning."""

    __module__ = "lightning.pytorch.trainer.trainer"

    def __init__(self, module: nn.Module) -> None:
        self.module, self.step, self.rows = module, 0, [torch.rand(3)]


def test_a_trainer_is_neither_copied_nor_looked_at_and_code_may_ask_it() -> None:
    class Scheduled(Owner):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * (1 + self.owned.step)
            return out

    owner, x = Scheduled(Trainer).eval(), images()
    fast = fast_of(owner)
    twin = fast._networks.twin
    for step in range(3):
        owner.owned.step = step
        torch.testing.assert_close(gradient(fast, x), gradient(owner, x))
    assert fast._networks.twin is twin, "the fast model was built anew"


@pytest.mark.parametrize("own", OWNED.values(), ids=OWNED.keys())
def test_an_owner_is_copied_without_what_it_owns(own: Any) -> None:
    owner, x = Owner(own).eval(), images()
    state = {key: value.clone() for key, value in owner.state_dict().items()}
    assert set(state) == {"net." + key for key in owner.net.state_dict()}
    for model in (owner, nn.Sequential(owner)):
        fast = fast_of(model)
        torch.testing.assert_close(gradient(fast, x), gradient(model, x))
        assert "1 folded" in fast.summary()
    fast, network = fast_of(owner), None
    for _ in range(2):
        with torch.no_grad():
            owner.net[1].weight.mul_(1.2)  # type: ignore[operator]
        torch.testing.assert_close(gradient(fast, x), gradient(owner, x))
        assert network in (None, fast._networks.folded.network)
        network = fast._networks.folded.network
    owner.load_state_dict(state)
    torch.testing.assert_close(gradient(fast, x), gradient(owner, x))
    assert owner.train() is owner
    assert owner.net.training
    torch.testing.assert_close(gradient(fast, x), gradient(owner.eval(), x))
    owner.double()
    torch.testing.assert_close(gradient(fast, x.double()), gradient(owner, x.double()), rtol=1e-4, atol=1e-5)
    assert [p.shape for p in owner.parameters() if p.numel()] == [p.shape for p in owner.net.parameters()]


@pytest.mark.parametrize("own", [OWNED["fast"], OWNED["fast-part"], OWNED["module-list"]])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_owner_owns_the_fast_model_of_itself(own: Any, way: Any) -> None:
    owner, x = Owner(own), images()
    fast: Any = owner.owned[0] if isinstance(owner.owned, nn.ModuleList) else owner.owned
    gradient(fast, x)
    again = way(owner)
    other: Any = again.owned[0] if isinstance(again.owned, nn.ModuleList) else again.owned
    assert other.wrapped is (again if fast.wrapped is owner else again.net)
    with torch.no_grad():
        again.net[1].weight.mul_(2)
    torch.testing.assert_close(gradient(other, x), gradient(other.wrapped.eval(), x))
    torch.testing.assert_close(gradient(fast, x), gradient(fast.wrapped.eval(), x))
    alone = copy.deepcopy(fast)
    assert alone.wrapped is not fast.wrapped
    torch.testing.assert_close(gradient(alone, x), gradient(fast, x))


def test_an_owner_that_was_saved_whole_is_loaded() -> None:
    owner, buffer = Owner(OWNED["fast"]), io.BytesIO()
    torch.save(owner, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(gradient(again.owned, images()), gradient(owner.owned, images()))


def test_training_on_its_own_attack_follows_without_new_networks() -> None:
    owner: Any = Owner(lambda owner: torchattacks.PGD(fast_of(owner), eps=0.05, steps=2))
    owner.optimizer = torch.optim.SGD(owner.parameters(), 0.1, momentum=0.9)
    owner.schedule = torch.optim.lr_scheduler.StepLR(owner.optimizer, 1)
    x, y, network = images(), torch.arange(6), None
    for _ in range(3):
        adversarial = owner.owned(x, y)
        owner.train()
        owner.optimizer.zero_grad()
        F.cross_entropy(owner(adversarial), y).backward()
        owner.optimizer.step()
        owner.schedule.step()
        fast = owner.owned.model
        torch.testing.assert_close(gradient(fast, x), gradient(owner.eval(), x))
        assert network in (None, fast._networks.folded.network)
        network = fast._networks.folded.network


# --- what runs them in its forward pass -------------------------------------------------------------------------------


class Adapting(Owner):
    """Trains itself when it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        self.owned.zero_grad()
        self.owned.step()
        return super().forward(x)


class AttackingItself(Owner):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.owned(x)
        return out


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Adapting(OWNED["optimizer"]), "Adam"),
        (lambda: AttackingItself(OWNED["fast-part"]), "FastAttackModel"),
        (lambda: AttackingItself(OWNED["SafePGD"]), "SafePGD"),
    ],
)
def test_a_forward_pass_that_uses_what_is_left_out_is_an_error(make: Any, name: str) -> None:
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = fast_of(model)
    for x in (images(), images().requires_grad_()):
        with pytest.raises(RuntimeError, match=f"neither trains nor attacks the model, got one that uses {name}"):
            fast(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fast_model_of_another_model_inside_is_refused() -> None:
    with pytest.raises(ValueError, match="with a FastAttackModel in it"):
        FastAttackModel(nn.Sequential(nn.Identity(), fast_of(small())))


# --- weights for the wrapped model ------------------------------------------------------------------------------------


def test_weights_for_a_fast_model_are_refused() -> None:
    net = small()
    fast = fast_of(net)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"fast.wrapped.load_state_dict"):
            fast.load_state_dict(small(1).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"fast.wrapped.load_state_dict"):
        fast.view(decisions="exact").load_state_dict(net.state_dict())
    fast.load_state_dict(fast.state_dict())
    fast.wrapped.load_state_dict(small(1).state_dict())
    torch.testing.assert_close(gradient(fast, images()), gradient(small(1), images()))


def test_weights_for_a_fast_model_in_a_parent_are_refused() -> None:
    parent = nn.ModuleDict({"head": nn.Linear(2, 2), "body": fast_of(small())})
    parent.load_state_dict(parent.state_dict())
    plain = nn.ModuleDict({"head": nn.Linear(2, 2), "body": small()})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*body.1.weight"):
        parent.load_state_dict(plain.state_dict())
    found = parent.load_state_dict(plain.state_dict(), strict=False)
    assert set(found.unexpected_keys) == {"body." + key for key in plain["body"].state_dict()}


def test_an_optimizer_of_a_fast_model_is_refused_when_it_steps() -> None:
    net = small()
    fast = fast_of(net)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(fast.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"fast.wrapped.parameters\(\)"):
            optimizer.step()
    for parent in (nn.ModuleList([nn.Linear(2, 2), fast]), nn.ModuleList([fast, nn.Linear(2, 2)])):
        torch.optim.SGD(parent.parameters(), lr=0.1).step()
    torch.optim.SGD([{"params": [p]} for p in parent.parameters()], lr=0.1).step()
    torch.optim.SGD([{"params": []}], lr=0.1).step()  # of a network of which everything is frozen
