"""Activations in place: the same numbers, bit for bit, in half the memory, and only where nobody can tell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison.memory import bytes_kept
from fastadv_adapters.folding import build as folding
from tests.support.engines import use_engine
from tests.support.tools import CountOperators, settle

CHANNELS = 4
IN_PLACE = ("relu_", "leaky_relu_", "hardtanh_", "elu_")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky_zero": lambda: nn.LeakyReLU(0.0),
}
PRODUCERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3), (6, 6)),
    "folded": (lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)), (6, 6)),
    "frozen": (lambda: nn.BatchNorm2d(CHANNELS), (6, 6)),
    "grouped": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2), (6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2), (6, 6)),
    "one_dimension": (lambda: nn.Conv1d(CHANNELS, CHANNELS, 3), (6,)),
    "three_dimensions": (lambda: nn.Conv3d(CHANNELS, CHANNELS, 2), (3, 3, 3)),
    "group_norm": (lambda: nn.GroupNorm(2, CHANNELS), (6, 6)),
    "dropout_between": (lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.Dropout(), nn.Identity()), (6, 6)),
}


def step(fast: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    leaf = x.clone().requires_grad_()
    output = fast(leaf)
    return output.detach(), torch.autograd.grad(output.sin().sum(), leaf)[0]


def changed_in_place(fast: nn.Module, x: Tensor) -> int:
    """How many activations run in place in one forward pass."""
    step(fast, x)  # the self-check
    with CountOperators() as counted:
        fast(x.clone().requires_grad_())
    return sum(counted.calls[name] for name in IN_PLACE)


def without(monkeypatch: pytest.MonkeyPatch, net: nn.Module, **options: Any) -> FastAttackModel:
    """The same fast model with nothing in place."""
    with monkeypatch.context() as patch:
        patch.setattr(folding, "run_in_place", lambda network: [])
        return FastAttackModel(net, engine="eager", **options)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_is_the_same_bit_for_bit(
    activation: str, producer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = PRODUCERS[producer]
    last = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)](CHANNELS, 3, 1)
    net = settle(nn.Sequential(make(), ACTIVATIONS[activation](), last, nn.Flatten()))
    x = torch.randn(3, CHANNELS, *size)
    fast, usual = FastAttackModel(net, dtype=dtype, engine="eager"), without(monkeypatch, net, dtype=dtype)
    assert (changed_in_place(fast, x), changed_in_place(usual, x)) == (1, 0)
    for found, wanted in zip(step(fast, x), step(usual, x), strict=True):
        assert torch.equal(found, wanted)
        assert found.any()
    assert not fast._networks.notes


@pytest.mark.parametrize("engine", ["eager", "compile", "cudagraph"])
def test_every_engine_runs_them(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_engine(monkeypatch, engine)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    net = settle(nn.Sequential(body, nn.Flatten(), nn.Linear(64, 5)))
    x = torch.rand(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32)
    for found, wanted in zip(step(fast, x), step(net.eval(), x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert fast.engine == engine
    assert "in place       2 activations\n" in fast.summary()


def test_what_kept_its_input_keeps_half(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU())]
    net = nn.Sequential(*pairs, nn.Conv2d(4, 1, 8), nn.Flatten())
    x = torch.rand(2, 4, 8, 8)
    monkeypatch.setattr(folding, "keep_shape_only", lambda part, kind: None)
    options: Any = {"dtype": torch.float32, "engine": "eager", "channels_last": False}
    image = 4 * 64 * 4  # bytes; the first convolution keeps one, each activation its output, or input and output
    assert bytes_kept(FastAttackModel(net, **options), x).total == 4 * image
    monkeypatch.setattr(folding, "run_in_place", lambda network: [])
    assert bytes_kept(FastAttackModel(net, **options), x).total == 7 * image


# --- where it is not done ---------------------------------------------------------------------------------------------


class OwnSequence(nn.Sequential):
    """Reads what its first layer gives a second time."""

    def forward(self, input: Tensor) -> Tensor:
        y = self[0](input)
        out: Tensor = self[1](y) + y
        return out


class ReadTwice(nn.Module):
    """Reads what a convolution gives beside its activation, after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.act(y) + y
        return out


class WithoutDefault(nn.Module):
    """Takes another branch where it is called than where it is traced: ``is None`` is not seen by a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.act(y) + (y if other is None else other)
        return out


class Keeper(nn.Conv2d):
    """Keeps its output, to be read by whom it pleases."""

    def forward(self, input: Tensor) -> Tensor:
        self.kept: Tensor = super().forward(input)
        return self.kept


class ReadsKept(nn.Module):
    """Reads what its first layer has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Keeper(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        (kept,) = (part.kept for part in self.body.children() if isinstance(part, Keeper))
        return y + kept


def hooked(part: nn.Module, change: Callable[[Tensor], Tensor] = torch.sin) -> nn.Module:
    """A layer with a hook behind it, which is handed the layer's own tensor."""
    part.register_forward_hook(lambda module, inputs, output: change(output))
    return part


def _conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "the input itself": lambda: nn.Sequential(nn.ReLU(), _conv()),
    "the input handed on": lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(), _conv()),
    "a view of the input": lambda: nn.Sequential(nn.Flatten(), nn.LeakyReLU(), nn.Linear(192, 4)),
    "behind what reads its own output": lambda: nn.Sequential(_conv(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU()),
    "a hook on the layer": lambda: nn.Sequential(hooked(_conv()), nn.ReLU()),
    "a hook on what hands on": lambda: nn.Sequential(_conv(), hooked(nn.Identity()), nn.ReLU()),
    "a hook on the sequence": lambda: nn.Sequential(hooked(nn.Sequential(_conv())), nn.ReLU()),
    "a hook on the activation": lambda: nn.Sequential(_conv(), hooked(nn.ReLU())),
    "a linear layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU()),
    "a sequence with its own code": lambda: OwnSequence(_conv(), nn.ReLU()),
    "code of the user's": ReadTwice,
    "a branch that no trace sees": lambda: nn.Sequential(WithoutDefault(), nn.Conv2d(4, 4, 3)),
    "a layer of the user's": ReadsKept,
    "a negative slope": lambda: nn.Sequential(_conv(), nn.LeakyReLU(-0.5), nn.Conv2d(4, 4, 3)),
    "an activation that copies its input": lambda: nn.Sequential(_conv(), nn.Hardtanh(), nn.Conv2d(4, 4, 3)),
    "an activation that loses digits": lambda: nn.Sequential(_conv(), nn.ELU(), nn.Conv2d(4, 4, 3)),
    "folding switched off": lambda: nn.Sequential(_conv(), nn.ReLU(), nn.Conv2d(4, 4, 3)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_and_right(case: str) -> None:
    net = LEFT_ALONE[case]().eval()
    x = torch.randn(3, 3, 8, 8)
    before = x.clone()
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager", fuse_bn=case != "folding switched off")
    assert changed_in_place(fast, x) == 0
    assert "in place       no activations\n" in fast.summary()
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    assert not fast._networks.notes


# --- where it is done only when the sequence calls --------------------------------------------------------------------


class CalledBothWays(nn.Module):
    """Runs its sequence, runs parts of it by hand, and reads what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body[1](self.body[0](x))
        through, sliced = self.body(x), self.body[:2](x)
        looped = sliced
        for layer in self.body[2:].children():
            looped = layer(looped)
        out: Tensor = self.body[2](y) + y + 0.3 * through + 0.1 * looped * sliced
        return out


class SharedActivation(nn.Module):
    """One activation called in a sequence, behind something that it must leave alone, and by hand."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Sigmoid(), act)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = x - 0.5
        out: Tensor = self.act(y).mean((1, 2, 3), keepdim=True) + self.body(x) + y.mean((1, 2, 3), keepdim=True)
        return out


class EditsItself(nn.Module):
    """Takes the convolution out of its sequence at the first call, so that the activation reads another's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.body = nn.Sequential(self.conv, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        self.body[0] = nn.Identity()
        y = self.conv(x)
        out: Tensor = self.body(y) + y
        return out


class TurnsItsSlope(nn.Module):
    """Sets an option of its activation while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.body[1].negative_slope = 0.7  # type: ignore[assignment]
        out: Tensor = self.body(x)
        return out


@pytest.mark.filterwarnings("ignore::fastadv_adapters.FastAttackWarning")  # a layer called without its norm
@pytest.mark.parametrize(
    ("make", "times"), [(CalledBothWays, 1), (SharedActivation, 1), (EditsItself, 0), (TurnsItsSlope, 1)]
)
def test_called_from_elsewhere_they_run_as_ever(make: Callable[[], nn.Module], times: int) -> None:
    net = settle(make()).eval()
    x = torch.randn(3, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    assert changed_in_place(fast, x) == times
    for found, wanted in zip(step(fast, x), step(net, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_users_own_activations_in_place_stay_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    assert changed_in_place(fast, torch.rand(2, 3, 8, 8)) == 1
    assert "in place       no activations\n" in fast.summary()  # none by the package's doing


def test_an_update_that_changes_an_activation_is_followed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    fast = FastAttackModel(net, dtype=torch.float32, engine="eager")
    assert changed_in_place(fast, x) == 1
    net[1].negative_slope = -0.4  # type: ignore[assignment]
    torch.testing.assert_close(step(fast, x), step(net, x), rtol=1e-4, atol=1e-5)
    assert changed_in_place(fast, x) == 0
