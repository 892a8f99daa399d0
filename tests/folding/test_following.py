"""Updates of what is not just weights with new values: attributes, buffers that a forward pass replaces, odd norms."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding.following import CopyTensor, FollowNorms
from fastadv_adapters.networks.freshness import Freshness
from tests.support.agreement import agrees
from tests.support.tools import batch, cosine, head_of, input_gradient, settle, small_net

FLOAT32: Any = {"dtype": torch.float32}


def fast_of(model: nn.Module, **options: object) -> FastAttackModel:
    return FastAttackModel(model, **{"dtype": torch.float32, "decisions": "fast", **options})  # type: ignore[arg-type]


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.temperature = torch.tensor(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.temperature
        return y


def test_an_attribute_replaced_by_one_of_another_dtype() -> None:
    torch.manual_seed(0)
    model, x = Multiplies(), torch.rand(4, 3)
    fast = fast_of(model)
    agrees(fast, model.eval(), x)
    model.temperature = torch.tensor(0.5)
    fast.update()
    agrees(fast, model.eval(), x)


class Rearranges(nn.Module):
    """Its forward pass puts another tensor in the place of a buffer."""

    shift: Tensor

    def __init__(self, how: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("shift", torch.arange(9.0).view(3, 3))
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.shift.sum() + self.shift[0, 1]
        self.shift = self.how(self.shift, len(x))
        return y


def transpose(t: Tensor, samples: int) -> Tensor:
    return t.t()


def shorten(t: Tensor, samples: int) -> Tensor:
    return t[:-1]


def match(t: Tensor, samples: int) -> Tensor:
    return t[:1].expand(samples, 3)


@pytest.mark.parametrize("how", [transpose, shorten, match])
@pytest.mark.parametrize("decisions", ["fast", "exact"])
def test_a_buffer_that_the_forward_pass_replaces(how: Callable[[Tensor, int], Tensor], decisions: str) -> None:
    torch.manual_seed(0)
    model = Rearranges(how)
    fast, first = fast_of(model, decisions=decisions), torch.arange(9.0).view(3, 3)
    for samples in (4, 2, 5):
        fast.update()  # the wrapped model is never run, so its buffer is as it was
        x = torch.rand(samples, 3)
        expected = model.layer(x) + first.sum() + first[0, 1]
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


class Remembers(nn.Module):
    """Its buffer is as large as the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("last", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.last = y.detach()
        return y


def test_a_buffer_as_large_as_the_batch() -> None:
    torch.manual_seed(0)
    model = Remembers()
    fast = fast_of(model)
    for trained_on, attacked in ((4, 2), (4, 2), (3, 5)):
        model(torch.rand(trained_on, 3))
        x = torch.rand(attacked, 3)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model.layer(x))


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_an_eps_that_is_a_tensor(change: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.eps = torch.tensor(1e-3)  # type: ignore[assignment]
    model, x = settle(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), torch.rand(2, 3, 6, 6)
    fast = fast_of(model)
    agrees(fast, model.eval(), x)
    if change == "in place":
        norm.eps.fill_(1.0)  # type: ignore[attr-defined]
    else:
        norm.eps = torch.tensor(3.0)  # type: ignore[assignment]
    fast.update()
    agrees(fast, model.eval(), x)


def test_pruned_by_hand() -> None:
    torch.manual_seed(0)
    layer, norm, last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)
    model = settle(nn.Sequential(layer, norm, nn.ReLU(), last))
    for module, names in ((layer, ("weight", "bias")), (norm, ("weight", "bias", "running_mean", "running_var"))):
        for name in names:
            kept = getattr(module, name).detach()[:4]
            setattr(module, name, nn.Parameter(kept) if name in ("weight", "bias") else kept)
    last.weight = nn.Parameter(last.weight.detach()[:, :4])
    fast = fast_of(model)
    agrees(fast, model.eval(), torch.rand(2, 3, 8, 8))
    assert "folded into layer 0" in fast.summary()


def test_float64_of_a_float32_model() -> None:
    torch.manual_seed(0)
    model, x = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    fast = fast_of(model, dtype=torch.float64, logits_dtype=torch.float64)
    with torch.no_grad():
        found = fast(x)
        torch.testing.assert_close(found, model.eval().double()(x), atol=1e-13, rtol=1e-13)


class Branches(nn.Module):
    """Runs its layer without the batch norm behind it where it is told to."""

    bare = torch.tensor(False)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if not type(self).bare:
            y = self.norm(y)
        return y


def test_without_following_a_new_build_is_still_of_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = settle(Branches()), torch.rand(2, 3, 6, 6)
    fast = fast_of(model, auto_update=False)
    with torch.no_grad():
        before = fast(x)
        for p in model.parameters():
            p.add_(1.0)
        monkeypatch.setattr(Branches, "bare", torch.tensor(True))
        with pytest.warns(UserWarning, match="not folded"):
            fast(x)
        monkeypatch.setattr(Branches, "bare", torch.tensor(False))
        torch.testing.assert_close(fast(x), before, atol=1e-5, rtol=1e-5)
    fast.update()
    agrees(fast, model.eval(), x)


def test_a_step_that_is_noted_while_another_is() -> None:
    layer = nn.Linear(3, 3)
    freshness = Freshness(layer)

    class Unrelated(set[int]):
        def isdisjoint(self, other: object) -> bool:
            freshness.note_step({id(layer.weight)})  # as if another thread came in between
            return True

    freshness.note_step(Unrelated())
    assert freshness._stepped


def test_compiled_no_weight_is_kept_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 64, 3))
    fast = FastAttackModel(settle(model), dtype=torch.bfloat16, engine="compile")
    network = fast._networks.folded.network
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    own = {t.data_ptr() for t in network.parameters()}
    refreshes = fast._networks.folded.refreshes
    folds = [fold for refresh in refreshes if isinstance(refresh, FollowNorms) for fold, _ in refresh._folds]
    copies = [refresh for refresh in refreshes if isinstance(refresh, CopyTensor)]
    writings = [*(fold.writing for fold in folds), *(copy.writing for copy in copies)]
    outs = [writing._out.data_ptr() for writing in writings if writing]
    assert len(folds) == 1
    assert len(outs) >= 3, "the fold, and weight and bias of the last layer"
    assert set(outs) <= own | {b.data_ptr() for b in network.buffers()}


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).pow(2).sum())(x),
    "vmap": lambda model, x: torch.func.vmap(lambda one: model(one[None])[0])(x),
    "grad in vmap": lambda model, x: torch.func.vmap(torch.func.grad(lambda one: model(one[None]).pow(2).sum()))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, on first use of jvp
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_change_that_is_noticed_inside_a_transform(
    transform: Callable[[nn.Module, Tensor], Tensor], rebuilt: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).eval()
    x = torch.rand(4, 1, 6, 6)
    fast = fast_of(model)
    for _ in range(2):
        torch.testing.assert_close(transform(fast, x), transform(model, x), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.mul_(2)
        if rebuilt:
            model[2] = nn.Sequential(nn.Flatten(), nn.Tanh())
    torch.testing.assert_close(transform(fast, x), transform(model, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


class Averages(nn.Module):
    """Its forward pass puts what it makes of a buffer in its place."""

    average: Tensor

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.layer = nn.Linear(3, 3)
        self.register_buffer("average", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.average
        self.average = self.make(self.average)
        return y


@pytest.mark.parametrize("decisions", ["auto", "fast"])
@pytest.mark.parametrize("make", [torch.exp, lambda t: t[:1].expand(3), lambda t: t[:2]])
def test_a_buffer_is_replaced_by_one_that_cannot_be_written(make: Callable[[Tensor], Tensor], decisions: str) -> None:
    torch.manual_seed(0)
    model, x = Averages(make).eval(), torch.rand(4, 3)
    fast = fast_of(model, decisions=decisions)
    for _ in range(3):
        expected = model.layer(x) + 1
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), expected)
        fast.update()
        torch.testing.assert_close(fast(x), expected)
        with torch.no_grad():
            model.layer.weight.mul_(1.5)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_twin_that_is_made_inside_a_transform(transform: str) -> None:
    """Of a model that writes into its own parameters, and is first called there."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(2)
            return x * self.weight

    model, x = Writes(), torch.rand(4, 3)
    fast = fast_of(model)
    TRANSFORMS[transform](fast, x)
    for factor in (1, 2):
        with torch.no_grad():
            model.weight.fill_(factor)
        fast.update()
        torch.testing.assert_close(fast(x), 2 * factor * x)
        assert torch.equal(model.weight, torch.full((3,), float(factor)))


class Centred(nn.Module):
    """Keeps a plain tensor as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mean = small_net(), torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x - self.mean)
        return out


def reference_of(net: Centred) -> nn.Module:
    found = copy.deepcopy(net).double()
    found.mean = found.mean.double()
    return found


def test_plain_tensors_are_followed_into_the_same_storage() -> None:
    net, (x, y) = Centred().eval(), batch()
    fast = FastAttackModel(net, **FLOAT32)
    input_gradient(fast, x, y)
    own = fast._networks.folded.network.mean
    net.mean = torch.full((1, 3, 1, 1), 0.25)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference_of(net), x.double(), y)) > 0.9999).all()
    assert fast._networks.folded.network.mean is own
    net.mean = torch.rand(1, 3, 8, 8)
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference_of(net), x.double(), y)) > 0.9999).all()


def test_without_auto_update_exact_values_are_of_one_model() -> None:
    net, (x, _) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=False)
    with torch.no_grad():
        before = fast(x).clone()
        head_of(net).weight.mul_(2)
        net.train()(torch.rand(8, 3, 8, 8) * 3)
        assert torch.equal(fast(x), before)
        torch.testing.assert_close(fast.update()(x), copy.deepcopy(net).eval()(x))
