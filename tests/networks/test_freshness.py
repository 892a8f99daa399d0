"""Every kind of change of the wrapped model that the fast model follows by itself, and those it cannot notice."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.boundary.scaling import START
from fastadv_adapters.networks.corners import Corners
from fastadv_adapters.networks.freshness import Change, Freshness
from tests.support.tools import batch, between_the_ends, cosine, input_gradient, reference, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}


@dataclass
class Settings:
    """A user's own configuration object."""

    temperature: float = 1.0
    inner: Any = None


class Configured(nn.Module):
    """A model with every kind of state: parameters, buffers, plain tensors, a flag, a list, an object."""

    offset: Tensor

    def __init__(self, *, with_bn: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(6) if with_bn else nn.Identity()
        self.head = nn.Linear(6, 10)
        self.register_buffer("offset", torch.zeros(()))
        self.bias_of_image = torch.zeros(3, 1, 1)
        self.flag = False
        self.scales = [1.0]
        self.settings = Settings(inner=Settings())
        self.tables = {"shift": [torch.zeros(1)]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.bias_of_image + self.offset)
        x = F.gelu(x) if self.flag else F.relu(self.bn(x))
        logits: Tensor = self.head(x.mean((2, 3))) * self.scales[0] / self.settings.temperature
        temperature: float = self.settings.inner.temperature
        return logits * temperature + self.tables["shift"][0]


def fused_adamw(model: Any) -> None:
    """Moves no version counter."""
    for parameter in model.parameters():
        parameter.grad = -parameter.detach()
    torch.optim.AdamW(model.parameters(), lr=0.02, fused=True).step()
    model.zero_grad()


def plain_sgd(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = -parameter.detach()
    torch.optim.SGD(model.parameters(), lr=0.02).step()
    model.zero_grad()


def training_forward(model: Any) -> None:
    """Moves the running statistics, but of the version counters only that of num_batches_tracked."""
    model.train()
    model(torch.rand(8, 3, 8, 8) * 3)
    model.eval()


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.conv.weight.mul_(1.5)


def buffer_in_place(model: Any) -> None:
    model.offset.fill_(0.3)


def data_exchanged(model: Any) -> None:
    model.head.weight.data = model.head.weight.data * 2


def through_data(model: Any) -> None:
    """As averages of weights are written in much code; PyTorch records nothing."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def last_row_through_numpy(model: Any) -> None:
    model.head.weight.detach().numpy()[-1] *= 2


def parameter_replaced(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 3)


def one_element_buffer_replaced(model: Any) -> None:
    model.offset = torch.full((), 0.2)


def state_loaded(model: Any) -> None:
    model.load_state_dict({key: value * 1.3 for key, value in model.state_dict().items()})


def state_assigned(model: Any) -> None:
    model.load_state_dict({key: value * 1.3 for key, value in model.state_dict().items()}, assign=True)


def plain_tensor_replaced(model: Any) -> None:
    model.bias_of_image = torch.full((3, 1, 1), 0.3)


def plain_tensor_of_another_shape(model: Any) -> None:
    model.bias_of_image = torch.full((1, 1), 0.3)


def plain_tensor_in_place(model: Any) -> None:
    model.bias_of_image.fill_(0.3)


def flag_changed(model: Any) -> None:
    model.flag = True


def list_changed(model: Any) -> None:
    model.scales[0] = 2.5


def object_changed(model: Any) -> None:
    model.settings.temperature = 4.0


def object_in_object_changed(model: Any) -> None:
    model.settings.inner.temperature = 2.0


def tensor_in_container_changed(model: Any) -> None:
    model.tables["shift"][0].add_(1.0)


def module_replaced(model: Any) -> None:
    model.head = nn.Linear(6, 10)


def hook_added(model: Any) -> None:
    model.head.register_forward_hook(lambda module, inputs, output: output * 2)


def layer_widened(model: Any) -> None:
    model.head = nn.Linear(6, 12)


def bias_added(model: Any) -> None:
    model.conv.bias = nn.Parameter(torch.rand(6))


def plain_tensor_gone(model: Any) -> None:
    model.bias_of_image = 0.3


def buffer_added(model: Any) -> None:
    """On a module that had none, as only a hook would read it."""
    model.head.register_buffer("extra", torch.full((10,), 2.0))
    model.head.register_forward_hook(lambda module, inputs, output: output + module.extra)


NOTICED: list[Callable[[Any], None]] = [
    fused_adamw,
    plain_sgd,
    training_forward,
    in_place,
    buffer_in_place,
    data_exchanged,
    through_data,
    last_row_through_numpy,
    parameter_replaced,
    one_element_buffer_replaced,
    state_loaded,
    state_assigned,
    plain_tensor_replaced,
    plain_tensor_of_another_shape,
    plain_tensor_in_place,
    flag_changed,
    list_changed,
    object_changed,
    object_in_object_changed,
    tensor_in_container_changed,
    module_replaced,
    hook_added,
    layer_widened,
    bias_added,
    plain_tensor_gone,
    buffer_added,
]


def follows(fast: FastAttackModel, model: nn.Module) -> None:
    """The fast model computes what the plain one computes now, exactly and fast."""
    x, y = batch(4)
    expected = reference(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), copy.deepcopy(model).eval()(x))
        fast_values = fast.view(decisions="fast")(x)
        torch.testing.assert_close(fast_values.double(), expected(x.double()), rtol=1e-4, atol=1e-5)
    assert (cosine(input_gradient(fast, x, y), input_gradient(expected, x.double(), y)) > 0.9999).all()


def make(*, with_bn: bool) -> Configured:
    model = Configured(with_bn=with_bn)
    settle(model)
    return model.eval()


# Without batch norm a training forward changes nothing.
FOLLOWED = [(change, bn) for change in NOTICED for bn in (True, False) if bn or change is not training_forward]


@pytest.mark.parametrize(
    ("change", "with_bn"), FOLLOWED, ids=[f"{'bn' if bn else 'no-bn'}-{change.__name__}" for change, bn in FOLLOWED]
)
def test_a_change_is_followed_before_the_next_forward(change: Callable[[Any], None], with_bn: bool) -> None:
    model = make(with_bn=with_bn)
    fast = FastAttackModel(model, dtype=torch.float32)
    follows(fast, model)
    before = model(batch(4)[0]).detach().clone()
    change(model)
    after = model(batch(4)[0]).detach()
    assert after.shape != before.shape or not torch.equal(after, before), "the change must show in the plain model"
    follows(fast, model)


@pytest.mark.parametrize("change", NOTICED, ids=lambda change: change.__name__)
def test_without_auto_update_a_change_waits_for_update(change: Callable[[Any], None]) -> None:
    model, (x, _) = make(with_bn=True), batch(4)
    fast = FastAttackModel(model, dtype=torch.float32, auto_update=False)
    x.requires_grad_()
    before = fast(x).detach()
    change(model)
    assert torch.equal(fast(x).detach(), before)
    assert fast.update() is fast
    follows(fast, model)


def test_what_cannot_be_noticed_is_followed_by_update() -> None:
    model = make(with_bn=True)
    fast = FastAttackModel(model, dtype=torch.float32)
    follows(fast, model)
    between_the_ends(model.conv.weight).mul_(2)
    model.head.weight.detach().numpy()[1:-1] *= 2
    assert fast._networks._freshness.change() is Change.NONE
    fast.update()
    follows(fast, model)


def test_statistics_without_a_count_are_followed() -> None:
    model: Any = make(with_bn=True)
    model.bn.num_batches_tracked = None
    fast = FastAttackModel(model, dtype=torch.float32)
    follows(fast, model)
    before = model.bn.running_mean.clone()
    training_forward(model)
    assert not torch.equal(model.bn.running_mean, before)
    follows(fast, model)


def test_tensors_of_which_an_end_cannot_be_read_are_passed_over() -> None:
    cells = Corners(
        [(torch.empty(0), 8), (torch.empty(2, device="meta"), 0), (torch.ones(1, dtype=torch.complex128), 8)]
    )
    assert cells.now() == []
    turned, spread = torch.arange(6, dtype=torch.int16).view(2, 3).t()[1:], torch.tensor(7).expand(4)
    assert Corners((t, t.data_ptr()) for t in (turned, spread)).now() == [1, 5, 7, 7]


def test_weights_of_inference_mode_are_followed() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    fast, (x, _) = FastAttackModel(model, dtype=torch.float32), batch(4)
    fast(x)
    with torch.inference_mode():
        model[1].weight.mul_(2)  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_modes_and_gradients_are_no_change() -> None:
    model = make(with_bn=True)
    freshness = Freshness(model)
    model.train()
    model.conv.eval()
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    assert freshness.change() is Change.NONE


def test_a_step_of_another_models_optimizer_is_no_change() -> None:
    freshness = Freshness(make(with_bn=True))
    fused_adamw(make(with_bn=True))
    assert freshness.change() is Change.NONE


def test_an_object_that_does_things_is_not_watched() -> None:
    model = make(with_bn=True)
    vars(model)["trainer"] = trainer = Settings(inner=print)
    freshness = Freshness(model)
    trainer.temperature = 3.0
    assert freshness.change() is Change.NONE


def test_a_rebuild_starts_afresh() -> None:
    model, (x, y) = Configured().eval(), batch(4)
    settle(model)
    fast = FastAttackModel(model, dtype=torch.float16)
    input_gradient(fast, x, y)
    fast._networks.state.start_at_most(0)
    fast._networks.notes.append("an old note")
    model.flag = True
    input_gradient(fast, x, y)
    assert int(fast._networks.state.exponent) == START
    assert "an old note" not in fast.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_values_keep_every_address(dtype: torch.dtype) -> None:
    model, (x, y) = small_net(), batch(4)
    fast = FastAttackModel(model, dtype=dtype)
    input_gradient(fast, x, y)
    network = fast._networks.folded.network
    tensors = [*network.parameters(), *network.buffers()]
    scales = [t for part in network.modules() for t in vars(part).get("scale_and_shift", {}).values()]
    addresses = [t.data_ptr() for t in (*tensors, *scales)]
    for change in (fused_adamw, training_forward, state_loaded):
        change(model)
        input_gradient(fast, x, y)
    assert fast._networks.folded.network is network
    assert [t.data_ptr() for t in (*network.parameters(), *network.buffers(), *scales)] == addresses
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(model), x.double(), y)) > 0.9).all()


def test_updating_twice_changes_nothing() -> None:
    fast, (x, y) = FastAttackModel(small_net(), dtype=torch.float32), batch(4)
    once = input_gradient(fast.update(), x, y)
    assert torch.equal(input_gradient(fast.update(), x, y), once)


def test_adversarial_training_follows_every_step() -> None:
    model, (x, y) = small_net(), batch(6)
    fast = FastAttackModel(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        adversarial = x + 0.03 * input_gradient(fast, x, y).sign()
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), y).backward()
        optimizer.step()
        model.eval()
        assert (cosine(input_gradient(fast, x, y), input_gradient(reference(model), x.double(), y)) > 0.9999).all()


def test_containers_in_tuples_are_followed() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factors = small_net(), ([1.0],)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * self.factors[0][0]
            return out

    net, (x, _) = Configured().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    before = fast(x)
    net.factors[0][0] = 5.0
    torch.testing.assert_close(fast(x), 5 * before)


class WithBuffer(nn.Module):
    """Reads a buffer that others exchange by ``.data``."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.scale.mean()
        return out


def test_storage_that_comes_back_at_the_same_address_is_noticed() -> None:
    net = WithBuffer()
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(2, 4, requires_grad=True)
    for _ in range(5):
        for _ in range(2):
            net.scale.data = net.scale.data * 0.9
        torch.testing.assert_close(fast(x), net(x))


def test_a_weight_turned_around_is_followed() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    fast, x = FastAttackModel(net, **FLOAT32), torch.rand(2, 4, requires_grad=True)
    fast(x)
    weight: Tensor = net[0].weight  # type: ignore[assignment]
    weight.data = weight.data.t()
    torch.testing.assert_close(fast(x), net(x))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))


def test_a_rebuild_asks_for_the_options_again() -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, dtype=torch.bfloat16)
    fast._networks.precision = fast._networks.precision.__class__(torch.device("cpu"), torch.float32, False)
    vars(net)["flag"] = 1
    assert fast._networks._freshness.change() is Change.STRUCTURE
    input_gradient(fast, x, y)
    assert fast.dtype == torch.bfloat16
    assert fast._networks.precision.channels_last


def test_one_warning_however_often_networks_are_built() -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.temperature = nn.Linear(6, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return (h - h.mean(0)) * self.temperature  # type: ignore[no-any-return]

    model, x = Annealed().eval(), torch.rand(4, 6)
    fast, found = FastAttackModel(model, dtype=torch.float32), []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast(x.clone().requires_grad_())
        found.append(len(caught))
        assert any("other samples" in note for note in fast._networks.notes)
        model.temperature *= 0.9
    assert found == [1, 0, 0]


class AddsWhatItFolds(nn.Module):
    """Reads the layer's output besides if a bool says so, in whatever holds that."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.held = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), held

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        out: Tensor = self.norm(hidden)
        return (out + hidden if self.flag() else out).mean((2, 3))

    def flag(self) -> Tensor:
        held: Any = vars(self.held) if isinstance(self.held, SimpleNamespace) else self.held
        flag: Tensor = held if isinstance(held, Tensor) else held["adds"] if isinstance(held, dict) else held[0]
        return flag


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: [t], lambda t: {"adds": t}, lambda t: SimpleNamespace(adds=t)])
def test_a_bool_that_decides_how_layers_are_connected_is_followed_wherever_it_is(hold: Callable[[Tensor], Any]) -> None:
    net, x = AddsWhatItFolds(hold(torch.tensor(False))).eval(), torch.rand(4, 3, 8, 8)
    net.norm.running_var.fill_(0.1)  # type: ignore[union-attr]
    fast = FastAttackModel(net, **FLOAT32)
    for value in (False, True):
        net.flag().fill_(value)
        torch.testing.assert_close(fast(x.clone().requires_grad_()), net(x), rtol=1e-4, atol=1e-4)


def test_a_container_that_holds_itself_is_compared_but_for_that() -> None:
    net, x, tree = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4), dict[str, Any]()
    tree["children"], tree["name"] = [{"parent": tree}], "root"
    net.tree = tree  # type: ignore[assignment]
    fast = FastAttackModel(net, **FLOAT32)
    networks = fast._networks
    torch.testing.assert_close(fast(x.requires_grad_()), net(x))
    assert networks._freshness.change() is Change.NONE
    tree["name"] = "another"
    assert networks._freshness.change() is Change.STRUCTURE
    torch.testing.assert_close(fast(x), net(x))
