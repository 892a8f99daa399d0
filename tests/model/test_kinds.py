"""Models as people have them: reparametrised, frozen, lazy, quantised, with hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from fastadv_adapters import FastAttackModel
from tests.support.agreement import agrees, train_a_step
from tests.support.tools import batch, fingerprint, head_of, input_gradient, small_net

FLOAT32: Any = {"dtype": torch.float32}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


# --- weights that are made from others, frozen, not there yet, or integers --------------------------------------------

Step = Callable[[Any], Any]
REPARAMETRISED: dict[str, tuple[Step, Step]] = {
    "old weight norm": (old_weight_norm, remove_weight_norm),
    "new weight norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "old spectral norm": (old_spectral_norm, remove_spectral_norm),
    "new spectral norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.4), lambda m: prune.remove(m, "weight")),
}


@pytest.mark.parametrize(("put_on", "take_off"), REPARAMETRISED.values(), ids=REPARAMETRISED.keys())
def test_a_reparametrisation_is_followed_when_put_on_trained_and_taken_off(put_on: Any, take_off: Any) -> None:
    net, x = small_net().eval(), batch(4)[0]
    fast = FastAttackModel(net, **FLOAT32)
    agrees(fast, net, x)
    for change in (put_on, lambda _: train_a_step(net, x), take_off, lambda _: train_a_step(net, x)):
        change(net[0])
        agrees(fast, net, x)


def test_pruning_goes_on_between_attacks() -> None:
    net, x = small_net().eval(), batch(4)[0]
    fast = FastAttackModel(net, **FLOAT32)
    for _ in range(3):
        prune.random_unstructured(net[0], "weight", 0.3)
        agrees(fast, net, x)
        train_a_step(net, x)
        agrees(fast, net, x)


def test_frozen_parts_stay_frozen_and_what_is_trained_is_followed() -> None:
    net, x = small_net().eval(), batch(4)[0]
    net[:-1].requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    fast = FastAttackModel(net, **FLOAT32)
    agrees(fast, net, x)
    before = fast(x).detach().clone()
    train_a_step(net, x)
    agrees(fast, net, x)
    assert not torch.equal(fast(x), before)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


def test_a_lazy_model_is_refused_until_it_is_initialised_and_folds_afterwards() -> None:
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()
    with pytest.raises(
        ValueError, match=r"expected initialised parameters, got 0.weight, which is lazy: run the model"
    ):
        FastAttackModel(net)
    x = batch(4)[0]
    net(x)
    fast = FastAttackModel(net, **FLOAT32)
    assert "1 folded" in fast.summary()
    agrees(fast, net, x)


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*is deprecated")
def test_models_quantised_by_pytorch_are_refused() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="expected a floating-point model, got quantised 0: integers have no gradient"):
        FastAttackModel(dynamic)
    with pytest.raises(ValueError, match="got quantised Linear"):
        FastAttackModel(dynamic[0])


class Quantisable(nn.Module):
    """Ready for quantisation: adds through PyTorch's own module, in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.add = small_net(), nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.add.add(self.net(x), self.net(1 - x))
        return out


def test_a_model_that_is_only_ready_for_quantisation_is_not() -> None:
    net = Quantisable().eval()
    agrees(FastAttackModel(net, **FLOAT32), net, batch(4)[0])


@pytest.mark.parametrize("asked", [True, False])
def test_weights_whose_memory_was_given_back_are_refused_until_they_are_there(asked: bool) -> None:
    net = small_net()
    fast, (x, y) = FastAttackModel(net, dtype=torch.float32), batch(4)
    before = input_gradient(fast, x, y)
    weight = next(net.parameters())
    kept, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected weights in memory, got .*weight, whose storage is too small"):
            fast.update() if asked else fast(x)
    storage.resize_(size)
    weight.data.copy_(kept)
    torch.testing.assert_close(input_gradient(fast, x, y), before)


def test_weights_whose_memory_was_shrunk_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 128))  # so large that nothing here reads it past PyTorch
    next(net.parameters()).untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=r"expected weights in memory, got 1\.weight, whose storage is too small"):
        FastAttackModel(net, dtype=torch.float32)


@pytest.mark.parametrize("saved", [True, False])
def test_nan_is_refused_in_buffers_that_are_saved_and_not_in_scratch_memory(saved: bool) -> None:
    net = small_net()
    net[0].register_buffer("scratch", torch.full((3,), torch.nan), persistent=saved)
    x = batch(4)[0]
    if saved:
        with pytest.raises(ValueError, match=r"got NaN in 0\.scratch"):
            FastAttackModel(net, **FLOAT32)
    else:
        agrees(FastAttackModel(net, **FLOAT32), net.eval(), x)


def test_what_becomes_unfit_later_is_refused_and_taken_again_when_mended() -> None:
    net, x = small_net().eval(), batch(4)[0]
    fast = FastAttackModel(net, **FLOAT32)
    net[7] = nn.LazyLinear(10)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got 7\.weight, which is lazy"):
            fast(x)
    net(x)
    agrees(fast, net, x)
    state = net.state_dict()
    net.to("meta")
    with pytest.raises(ValueError, match=r"expected real weights, got 0\.weight on the meta device"):
        fast(x)
    net.to_empty(device="cpu")
    net.load_state_dict({key: torch.zeros(value.shape) + 0.1 for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_see_tensors_only_and_what_they_keep_is_the_callers() -> None:
    net, (x, y) = small_net(), batch()
    seen: list[Any] = []
    net[3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net[4].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    before = fingerprint(net)
    fast = FastAttackModel(net, **FLOAT32)
    assert "5 folded" in fast.summary(), "a block with a hook is traced by itself"
    input_gradient(fast, x, y)
    assert all(isinstance(value, Tensor) for value in seen)
    seen.clear()
    input_gradient(fast, x, y)
    assert [value.shape for value in seen] == [(6, 8, 8, 8)] * 2
    assert fingerprint(net) == before


def test_a_hook_may_read_a_global_that_is_named_like_an_attribute() -> None:
    net, (x, y) = small_net(), batch()
    net[7].register_forward_hook(lambda module, inputs, output: output * module.in_features)
    globals()["in_features"] = net
    try:
        fast = FastAttackModel(net, **FLOAT32)
    finally:
        del globals()["in_features"]
    torch.testing.assert_close(fast(x.requires_grad_()), net.eval()(x), rtol=1e-4, atol=1e-4)
    assert head_of(net).in_features == 16
    assert y.shape == (6,)


def test_a_package_of_the_users_may_be_called_quantized() -> None:
    kind = type("Layer", (nn.Linear,), {"__module__": "mynet.quantized.layers"})
    fast, x = FastAttackModel(nn.Sequential(kind(4, 3)), **FLOAT32), torch.rand(2, 4)
    torch.testing.assert_close(fast(x), fast.wrapped(x).detach())


# --- classes that have another one before nn.Module -------------------------------------------------------------------

T = TypeVar("T")


class Classifier(ABC, nn.Module):
    """Abstract bases come first in many code bases."""

    @abstractmethod
    def classes(self) -> int: ...


class Abstract(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.Parameter(torch.ones(8, 1, 1))

    def classes(self) -> int:
        return 8

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x).relu() * self.scale.tanh()).mean((2, 3))  # type: ignore[no-any-return]


class AbstractConvolution(ABC, nn.Conv2d):
    pass


class OfSomeType(Generic[T], nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = AbstractConvolution(3, 8, 3), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.scale.tanh()).mean((2, 3))  # type: ignore[no-any-return]


class TakesNoNewNames(OfSomeType[int]):
    def __init__(self) -> None:
        super().__init__()
        vars(self)["whole"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "whole" in vars(self) and name not in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Abstract, OfSomeType, TakesNoNewNames])
def test_classes_with_another_one_first_are_right_and_followed(kind: type[nn.Module]) -> None:
    model, (x, _) = kind().eval(), batch()
    fast = FastAttackModel(model, dtype=torch.float32, engine="eager")
    agrees(fast, model, x)
    train_a_step(model, x)
    agrees(fast, model.eval(), x)
    assert isinstance(fast._networks.folded.network, kind)
