"""What does nothing when a fast model is made, so that the self-check does not see it, and is something later."""

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from tests.support.tools import cosine, settle

FLOAT32: Any = {"dtype": torch.float32, "decisions": "fast"}
SLOPES = {"slope": 0.1}


class Skip(nn.BatchNorm2d):
    """Reads its input besides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.alpha * input


class Gain(nn.BatchNorm2d):
    """Writes in place, and takes what it wrote into."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))
        self.slope = torch.tensor(0.1)

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        out.mul_(self.gain)
        return out


class ReadsAGlobal(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), SLOPES["slope"])


class ReadsItsClass(nn.BatchNorm2d):
    slope = 0.1

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), self.slope)


class ReadsAnItem(Gain):
    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(input), self.slope.item())


class Counts(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.runs = 0

    def forward(self, input: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(input) * (1 + 0.1 * self.runs)


class Chooses(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out if random.random() < 0.5 else out.relu()


class Parts(nn.BatchNorm2d):
    """Two parts, which may be one."""

    def __init__(self, channels: int, *, one: bool) -> None:
        super().__init__(channels)
        self.first = nn.PReLU()
        self.second = self.first if one else nn.PReLU()

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return self.first(out) + self.second(-out)  # type: ignore[no-any-return]


class Masked(nn.Conv2d):
    """Reads what code has put on its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        weight = weight * weight.mask if hasattr(weight, "mask") else weight
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out


class WithoutBias(nn.Module):
    """Leaves out the bias of a layer, which is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv._conv_forward(F.silu(x), self.conv.weight, None)
        return out.relu()


class Scaled(nn.Module):
    """By the first of a queue; and more if a switch is on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.queue, self.on = deque([torch.tensor(1.0)], maxlen=1), torch.tensor(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        out: Tensor = self.norm(hidden) * self.queue[0]
        return out + hidden if self.on else out


def net(*parts: nn.Module) -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return settle(nn.Sequential(*layers)).eval()  # type: ignore[return-value]


def outcome(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf)
    return logits.detach(), gradient


def same(fast: FastAttackModel, model: nn.Module, x: Tensor) -> None:
    found, wanted = outcome(fast, x), outcome(model, x)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    assert (cosine(found[1], wanted[1]) > 0.9999).all()


def fill(place: int, name: str, value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        with torch.no_grad():
            getattr(model[place], name).fill_(value)

    return change


def untie(model: Any) -> None:
    model[1].second = nn.PReLU(init=2.0)


def mask(model: Any) -> None:
    model[1].weight.mask = (torch.rand_like(model[1].weight) > 0.5).float()


def bias(model: Any) -> None:
    model[1].conv.bias.data = torch.ones(8)


def queue(model: Any) -> None:
    model[1].queue.append(torch.tensor(3.0))


class Adapted(nn.Module):
    """Calls a network with other weights, which are the same at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        others = {name: tensor + self.shift for name, tensor in self.inner.named_parameters()}
        found: Tensor = torch.func.functional_call(self.inner, others, (x,))
        return found


class ReadsAWeight(Adapted):
    """Where a trace does not come."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() > -1e9 else -x
        weight: Any = self.inner[0].weight
        found: Tensor = self.inner(x) + self.shift * F.conv2d(x, weight)
        return found


CHANGES: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], Any]]] = {
    "reads its input besides": (lambda: [Skip(8)], fill(1, "alpha", 1.0)),
    "writes in place": (lambda: [Gain(8)], fill(1, "gain", 3.0)),
    "reads a global": (lambda: [ReadsAGlobal(8)], lambda model: SLOPES.update(slope=1.5)),
    "reads its class": (lambda: [ReadsItsClass(8)], lambda model: setattr(type(model[1]), "slope", 1.5)),
    "reads an item": (lambda: [ReadsAnItem(8)], fill(1, "slope", 1.5)),
    "parts that become two": (lambda: [Parts(8, one=True)], untie),
    "a mask that comes later": (lambda: [Masked(8, 8, 3)], mask),
    "no bias": (lambda: [WithoutBias()], bias),
    "other weights": (lambda: [Adapted()], fill(1, "shift", 0.5)),
    "a weight that is read": (lambda: [ReadsAWeight()], fill(1, "shift", 3.0)),
    "a queue": (lambda: [Scaled()], queue),
    "a switch": (lambda: [Scaled()], fill(1, "on", 1.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLOPES, "slope", 0.1)
    monkeypatch.setattr(ReadsItsClass, "slope", 0.1)
    make, change = CHANGES[name]
    torch.manual_seed(0)
    model, x = net(*make()), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    same(fast, model, x)
    change(model)
    same(fast, model, x)
    assert not fast._networks.notes


def test_norms_that_look_alike_and_share_their_parts_or_not() -> None:
    torch.manual_seed(0)
    model, x = net(Parts(8, one=True), nn.Conv2d(8, 8, 3), Parts(8, one=False)), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    same(fast, model, x)
    second: Any = model[3].second
    with torch.no_grad():
        second.weight.fill_(2.0)
    same(fast, model, x)


def test_a_norm_that_counts_goes_on_counting() -> None:
    model, x = net(Counts(8)), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    plain: Any = copy.deepcopy(model)
    outcome(fast, x)
    ours: Any = fast._networks.folded.network
    ours[1].runs, plain[1].runs = 0, 0
    for _ in range(3):
        torch.testing.assert_close(outcome(fast, x)[0], outcome(plain, x)[0], rtol=1e-3, atol=1e-4)


def test_a_norm_that_chooses_at_random_goes_on_choosing() -> None:
    model, x = net(Chooses(8)), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    outcome(fast, x)
    for run in (fast, model):
        random.seed(0)
        assert len({round(float(outcome(run, x)[0].sum()), 3) for _ in range(12)}) == 2


def test_a_mask_that_is_there_from_the_beginning() -> None:
    torch.manual_seed(0)
    model, x = net(Masked(8, 8, 3)), torch.rand(4, 3, 8, 8)
    mask(model)
    weight: Any = model[1].weight
    fast = FastAttackModel(model, **FLOAT32)
    same(fast, model, x)
    with torch.no_grad():
        weight.mask.mul_(0.5)
    same(fast, model, x)
    weight.mask = torch.ones(8, 8, 3, 3)
    same(fast, model, x)


def prune(model: Any) -> None:
    model[1].weight.data = model[1].weight.data * model[1].weight.mask


def replace_bare(model: Any) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


@pytest.mark.parametrize("decisions", ["fast", "exact"])
def test_masks_go_with_tensors_that_are_moved_or_replaced(decisions: Any) -> None:
    torch.manual_seed(0)
    model, x = net(Masked(8, 8, 3)), torch.rand(4, 3, 8, 8)
    mask(model)
    fast = FastAttackModel(model, dtype=torch.float32, decisions=decisions)
    for change in (prune, replace_bare, mask):
        same(fast, model, x)
        change(model)
    same(fast, model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)


class Remembers(nn.Conv2d):
    """Writes into what is on its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        weight.seen["last"] = input.detach().mean()
        weight.seen["list"].append(1)
        return super().forward(input)


def test_what_is_on_a_weight_is_not_written_into() -> None:
    layer, x = Remembers(8, 8, 3), torch.rand(4, 3, 8, 8)
    seen: dict[str, Any] = {"list": []}
    weight: Any = layer.weight
    weight.seen = seen
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Flatten(), nn.Linear(128, 5)).eval()
    outcome(FastAttackModel(model, **FLOAT32), x)
    assert seen == {"list": []}


@pytest.mark.parametrize("owner", [lambda model: model, lambda model: model[0], lambda model: [model[4]]])
def test_a_weight_that_knows_its_owner(owner: Callable[[Any], Any]) -> None:
    model, x = net(nn.BatchNorm2d(8), nn.ReLU()), torch.rand(4, 3, 8, 8)
    weight: Any = model[0].weight
    weight.owner = owner(model)
    fast = FastAttackModel(model, **FLOAT32)
    same(fast, model, x)
    own = vars(fast._networks.twin.engine.network[0].weight)["owner"]  # type: ignore[index]
    assert own is not weight.owner


def test_gradients_of_samples_on_weights_are_no_change() -> None:
    model, x = net(nn.Identity()), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    network = fast._networks.folded.network
    for weight in model.parameters():
        vars(weight)["grad_sample"] = torch.rand(4, *weight.shape)
    same(fast, model, x)
    assert fast._networks.folded.network is network


class Inherits(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Decorated(Adapted):
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        others = {name: tensor + self.shift for name, tensor in self.inner.named_parameters()}
        found: Tensor = torch.func.functional_call(self.inner, others, (x,))
        return found


class ByAProperty(Adapted):
    @property
    def others(self) -> dict[str, Tensor]:
        return {name: tensor + self.shift for name, tensor in self.inner.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(self.inner, self.others, (x,))
        return found


@pytest.mark.parametrize("kind", [Inherits, Decorated, ByAProperty])
def test_other_weights_however_a_forward_is_written(kind: type[Adapted]) -> None:
    torch.manual_seed(0)
    model, x = net(kind()), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    same(fast, model, x)
    fill(1, "shift", 0.5)(model)
    same(fast, model, x)


class Clamps(nn.BatchNorm2d):
    """Writes into its own weight, which changes nothing at first."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.clamp_(min=0)
        return super().forward(input)


@pytest.mark.filterwarnings("ignore:FastAttackModel")
def test_a_norm_that_writes_into_its_own_weight_is_kept() -> None:
    fast = FastAttackModel(net(Clamps(8)), **FLOAT32)
    assert fast._networks.folded.report["1"].startswith("kept: its own forward does more")


def test_a_switch_made_in_inference_mode() -> None:
    part = Scaled()
    with torch.inference_mode():
        part.on = torch.tensor(True)
    model, x = net(part), torch.rand(4, 3, 8, 8)
    same(FastAttackModel(model, **FLOAT32), model, x)


class Draws(nn.Module):
    """Draws the weights of a large layer in every pass, past all records."""

    drawn: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3)
        self.layer: nn.Module = nn.Linear(64, 1024) if kind == "linear" else nn.Conv2d(64, 128, 3)
        self.register_buffer("drawn", self.layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        weight.data.copy_(self.drawn * (1 + 0.5 * torch.randn_like(self.drawn)))
        hidden = self.first(x).relu()
        hidden = hidden.flatten(2).transpose(1, 2) if isinstance(self.layer, nn.Linear) else hidden
        return self.layer(hidden).flatten(2).mean(2)[:, :8]  # type: ignore[no-any-return]


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
@pytest.mark.filterwarnings("ignore:FastAttackModel")
def test_weights_that_are_drawn_past_all_records_are_drawn_in_every_pass(kind: str, *, auto_update: bool) -> None:
    torch.manual_seed(0)
    model, x = Draws(kind).eval(), torch.rand(8, 3, 8, 8)
    fast = FastAttackModel(model, auto_update=auto_update, **FLOAT32)
    outcome(fast, x)
    ours, theirs = ([outcome(run, x)[0] for _ in range(8)] for run in (fast, model))
    spread, wanted = torch.stack(ours).std(0).mean(), torch.stack(theirs).std(0).mean()
    assert 0.5 * wanted < spread < 2 * wanted


class WritesEachEntry(nn.Module):
    """By an operator that counts no version."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.size.detach().clone().apply_(lambda value: 1.5 * value)


def test_what_is_written_entry_by_entry_is_not_kept() -> None:
    model, x = net(WritesEachEntry()), torch.rand(4, 3, 8, 8)
    fast = FastAttackModel(model, **FLOAT32)
    for _ in range(4):
        same(fast, model, x)


class AsksForItsDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.to(next(self.parameters()).dtype))
        return found


def test_to_ask_for_a_dtype_is_not_to_read() -> None:
    fast = FastAttackModel(net(AsksForItsDtype()), **FLOAT32)
    assert fast._networks.folded.report == {"1.inner.1": "folded into 1.inner.0"}


class WithWeights(nn.Module):
    """Hands out something of its weights, which no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(nn.BatchNorm2d(8))
        self.prototypes = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), F.normalize(self.prototypes)


def test_an_output_of_weights_alone_is_no_difference() -> None:
    model, x = WithWeights().eval(), torch.rand(4, 3, 8, 8).requires_grad_()
    fast = FastAttackModel(model, **FLOAT32)
    logits, prototypes = fast(x)
    logits.logsumexp(1).sum().backward()
    torch.testing.assert_close(prototypes, model(x)[1].detach())
    assert not fast._networks.notes
    assert [kind.full for kind in fast._networks.kinds.values()] == [False]
