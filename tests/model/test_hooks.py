"""Hooks: on a fast model, in its views and copies and attacks; and on the wrapped model, of whoever owns them."""

import copy
import functools
import pickle
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.torchattacks import SafePGD as SafePGDOfTorchattacks
from fastadv_adapters.torchattacks import accelerate
from tests.support.tools import input_gradient

FLOAT32: Any = {"dtype": torch.float32}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]


# --- on the fast model ------------------------------------------------------------------------------------------------

KINDS = ["pre", "pre-kwargs", "forward", "forward-kwargs", "always", "backward", "backward-pre"]
seen: list[str] = []  # functions at the top of a module can be pickled


def _pre(module: nn.Module, args: Any) -> None:
    seen.append("pre")


def _pre_kwargs(module: nn.Module, args: Any, kwargs: Any) -> None:
    seen.append("pre-kwargs")


def _forward(module: nn.Module, args: Any, output: Any) -> None:
    seen.append("forward")


def _forward_kwargs(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    seen.append("forward-kwargs")


def _always(module: nn.Module, args: Any, output: Any) -> None:
    seen.append("always")


def _backward(module: nn.Module, inputs: Any, outputs: Any) -> None:
    assert inputs[0].shape[1:] == (3, 4, 4)
    seen.append("backward")


def _backward_pre(module: nn.Module, outputs: Any) -> None:
    seen.append("backward-pre")


def hook(fast: nn.Module) -> list[Any]:
    seen.clear()
    return [
        fast.register_forward_pre_hook(_pre),
        fast.register_forward_pre_hook(_pre_kwargs, with_kwargs=True),
        fast.register_forward_hook(_forward),
        fast.register_forward_hook(_forward_kwargs, with_kwargs=True),
        fast.register_forward_hook(_always, always_call=True),
        fast.register_full_backward_hook(_backward),
        fast.register_full_backward_pre_hook(_backward_pre),
    ]


WAYS: dict[str, Callable[[FastAttackModel], nn.Module]] = {
    "itself": lambda fast: fast,
    "view": lambda fast: fast.view(decisions="exact"),
    "view-of-a-view": lambda fast: fast.view(full_precision=True).view(decisions="exact"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
    "deepcopy-of-a-view": lambda fast: copy.deepcopy(fast.view(decisions="exact")),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_all_hooks_run_in_what_is_made_of_the_fast_model(way: Any) -> None:
    fast, x = FastAttackModel(small(), **FLOAT32), images()
    hook(fast)
    other = way(fast)
    assert torch.equal(gradient(other, x), gradient(fast, x))
    assert sorted(set(seen)) == sorted(KINDS)
    assert all(seen.count(kind) == 2 for kind in KINDS)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_and_its_removal_reach_every_view(before: bool) -> None:
    fast, x = FastAttackModel(small(), **FLOAT32), images()
    views = [fast.view(decisions="exact")] if before else []
    handles = hook(fast)
    views = views or [fast.view(decisions="exact")]
    gradient(views[0], x)
    assert sorted(seen) == sorted(KINDS)
    seen.clear()
    views[0].register_forward_hook(_forward)
    gradient(fast, x)
    assert seen.count("forward") == 2, "a hook on the view is one on the model"
    for handle in handles:
        handle.remove()
    seen.clear()
    gradient(fast, x)
    gradient(views[0], x)
    assert seen == ["forward", "forward"]


def test_a_copy_has_hooks_of_its_own() -> None:
    fast, x = FastAttackModel(small(), **FLOAT32), images()
    other = copy.deepcopy(fast)
    hook(fast)
    gradient(other, x)
    assert not seen
    with pytest.raises(RuntimeError, match="Cannot use both regular backward hooks and full"):
        fast.view(decisions="exact").register_backward_hook(lambda *args: None)


def _attacks(fast: FastAttackModel, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    box = (0.0, 1.0)
    return {
        "SafePGD": lambda: SafePGD(fast, eps=0.1, steps=2)(x, y),
        "torchattacks": lambda: torchattacks.PGD(fast, steps=2)(x, y),
        "torchattacks.SafePGD": lambda: SafePGDOfTorchattacks(fast, steps=2)(x, y),
        "accelerate": lambda: accelerate(torchattacks.PGD(fast, steps=2))(x, y),
        "foolbox": lambda: foolbox.attacks.LinfPGD(steps=2)(FastPyTorchModel(fast, box), x, y, epsilons=0.1),
        "foolbox-plain": lambda: foolbox.attacks.LinfPGD(steps=2)(foolbox.PyTorchModel(fast, box), x, y, epsilons=0.1),
    }


@pytest.mark.parametrize("name", _attacks(None, images(), images()))  # type: ignore[arg-type]
def test_hooks_run_in_attacks(name: str) -> None:
    fast, x = FastAttackModel(small(), **FLOAT32), images()
    attack = _attacks(fast, x, fast(x).argmax(1))[name]
    hook(fast)
    attack()
    assert {"pre", "forward"} <= set(seen)


def test_a_hook_that_changes_what_passes_changes_it_in_attacks() -> None:
    fast, x = FastAttackModel(small(), **FLOAT32), images()
    fast.register_forward_pre_hook(lambda module, args: (args[0] * 0.0,))
    torch.testing.assert_close(fast.view(decisions="exact")(x), small()(x * 0))
    assert gradient(fast.view(full_precision=True), x).abs().max() == 0


def test_a_hook_that_holds_the_fast_model_is_copied_with_it() -> None:
    class Holder:
        def __init__(self, fast: nn.Module) -> None:
            self.fast, self.calls = fast, 0
            fast.register_forward_hook(self.count)

        def count(self, module: nn.Module, args: Any, output: Any) -> None:
            self.calls += 1

    fast = FastAttackModel(small(), **FLOAT32)
    holder = Holder(fast)
    other = copy.deepcopy(fast)
    other(images())
    hooks: list[Any] = list(other._forward_hooks.values())
    again = hooks[0].__self__
    assert again.fast is other
    assert (again.calls, holder.calls) == (1, 0)


# --- on the wrapped model ---------------------------------------------------------------------------------------------


class Extractor:
    """Keeps what passes; holds the model and more, which nobody copies."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer = model, layer
        self.store: dict[str, Tensor] = {}
        self.calls = 0
        self.rows = iter(())  # what cannot be copied
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.note("out", output)

    def note(self, name: str, output: Tensor) -> None:
        self.store[name] = output
        self.calls += 1


class CallableExtractor(Extractor):
    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None: ...

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model, layer)
        layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.store["out"] = output


class PartialExtractor(Extractor):
    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model, layer)
        layer.register_forward_hook(functools.partial(self.keep_as, "named"))

    def keep_as(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.store[name] = output


def _into(store: dict[str, Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    store["out"] = output


class PartialFunctionExtractor(Extractor):
    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model, layer)
        layer._forward_hooks.clear()
        layer.register_forward_hook(functools.partial(_into, self.store))


class ModuleExtractor(nn.Module):
    """A module that is no part of the model."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.store: dict[str, Tensor] = {}
        layer.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.store["out"] = output


EXTRACTORS = [Extractor, CallableExtractor, PartialExtractor, PartialFunctionExtractor, ModuleExtractor]


@pytest.mark.parametrize("kind", EXTRACTORS)
@pytest.mark.parametrize("place", [None, 1, 2])
def test_hooks_store_where_their_owner_looks(kind: Any, place: int | None) -> None:
    model, x = small(), images()
    plain = copy.deepcopy(model)
    extractor = kind(model, model if place is None else model[place])
    fast = FastAttackModel(model, **FLOAT32)
    torch.testing.assert_close(gradient(fast, x), gradient(plain, x))
    expected = plain(x) if place is None else plain[: place + 1](x)
    for found in extractor.store.values():
        torch.testing.assert_close(found.detach(), expected)
    assert extractor.store


def test_a_hook_that_is_a_method_of_the_model_stays_in_the_copy() -> None:
    class Records(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()
            self.kept: list[Tensor] = []
            self.helper = Helper()
            self.body[1].register_forward_hook(self.keep)
            self.body[2].register_forward_hook(self.helper.keep)

        def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.kept.append(output)

        def forward(self, x: Tensor) -> Tensor:
            self.kept.clear()
            out: Tensor = self.body(x) + self.kept[0][:, :10] + self.helper.last[:, :10]
            return out

    class Helper:
        last: Any = None

        def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.last = output

    model, x = Records(), images()
    expected = gradient(model, x)
    model.kept.clear()
    model.helper.last = None
    torch.testing.assert_close(gradient(FastAttackModel(model, **FLOAT32), x), expected)
    assert not model.kept
    assert model.helper.last is None


class Writer(Extractor):
    def note(self, name: str, output: Tensor) -> None:
        self.layer.last = output


class DecoratedWriter(Extractor):
    @torch.no_grad()
    def note(self, name: str, output: Tensor) -> None:
        self.layer.last = output


class WriterByName(Extractor):
    """Finds the model's layers in a dictionary, where those of a copy are not."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.names = {part: name for name, part in model.named_modules()}
        super().__init__(model, layer)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.store[self.names[module]] = output


class CallableWriter(CallableExtractor):
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.model.last = output


class PartialWriter(Extractor):
    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__(model, layer)
        layer.register_forward_hook(functools.partial(lambda name, *args: setattr(layer, name, 1), "last"))


@pytest.mark.parametrize("kind", [Writer, DecoratedWriter, WriterByName, CallableWriter, PartialWriter])
def test_hooks_that_reach_the_model_through_their_owner_are_refused(kind: Any) -> None:
    model = small()
    kind(model, model[1])
    with pytest.raises(ValueError, match="expected hooks that reach their module through their arguments"):
        FastAttackModel(model)


def by_default(model: Any) -> Any:
    return lambda module, inputs, output, model=model: model[1](inputs[0])


def by_keyword(model: Any) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor, *, layer: Any = model[1]) -> None:
        layer.last = output

    return hook


def by_default_of_another(model: Any) -> Any:
    run = by_default(model)
    return lambda module, inputs, output, run=run: run(module, inputs, output)


@pytest.mark.parametrize("make", [by_default, by_keyword, by_default_of_another])
def test_hooks_that_have_the_model_as_a_default_are_refused(make: Any) -> None:
    model = small()
    model[1].register_forward_hook(make(model))
    with pytest.raises(ValueError, match="expected hooks that reach their module through their arguments"):
        FastAttackModel(model)


NAMED: Any = small()


def note(output: Tensor) -> None:
    NAMED.last = output


class Naming:
    """Reaches the model as a global."""

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        note(output)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.keep(module, inputs, output)

    def spare(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert output is not None


class NamingLinear(nn.Linear):
    keep: Any = Naming.keep
    spare: Any = Naming.spare


def test_hooks_that_name_the_model_in_a_method_are_refused() -> None:
    NAMED[1] = layer = NamingLinear(48, 32)
    for hook in (Naming().keep, Naming(), layer.keep, lambda module, inputs, output: note(output)):
        handle = NAMED[1].register_forward_hook(hook)
        with pytest.raises(ValueError, match="expected hooks that reach their module through their arguments"):
            FastAttackModel(NAMED)
        handle.remove()
    for hook in (Naming().spare, layer.spare):
        NAMED[1].register_forward_hook(hook)
    torch.testing.assert_close(gradient(FastAttackModel(NAMED, **FLOAT32), images()), gradient(NAMED, images()))


def test_hooks_around_saving_do_not_take_their_owner_along() -> None:
    class Saver:
        def __init__(self, model: nn.Module) -> None:
            self.rows = iter(())  # what cannot be copied
            model.register_state_dict_pre_hook(self.saved)
            model.register_load_state_dict_post_hook(self.loaded)

        def saved(self, *args: Any) -> None: ...

        def loaded(self, *args: Any) -> None: ...

    model, x = small(), images()
    Saver(model)
    torch.testing.assert_close(gradient(FastAttackModel(model, **FLOAT32), x), gradient(small(), x))


class Supervised(nn.Module):
    """Returns what a hook has kept in a container or an object that the model holds, too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(48, 32), nn.Linear(32, 10)
        kept: Any = {"namespace": SimpleNamespace(), "list": [], "queue": deque()}.get(way, {})
        self.kept = kept

        def default(module: nn.Module, given: Any, output: Tensor, kept: Any = kept) -> None:
            kept["first"] = output

        hooks: dict[str, Any] = {
            "closure": lambda module, given, output: kept.update(first=output),
            "default": default,
            "partial": functools.partial(lambda kept, module, given, output: kept.update(first=output), kept),
            "namespace": lambda module, given, output: setattr(kept, "first", output),
            "list": lambda module, given, output: kept.append(output),
            "queue": lambda module, given, output: kept.append(output),
            "function": lambda output: kept.update(first=output),
        }
        self.keep = hooks[way] if way == "function" else None
        if way != "function":
            self.first.register_forward_hook(hooks[way])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        if self.keep is not None:
            self.keep(hidden)
        kept: Any = self.kept
        first = kept["first"] if isinstance(kept, dict) else kept.first if hasattr(kept, "first") else kept.pop()
        logits: Tensor = self.last(hidden.relu()) + first.mean(1, keepdim=True) * first[:, :10]
        return logits


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", ["closure", "default", "partial", "namespace", "list", "queue", "function"])
def test_containers_that_hooks_and_the_model_share_are_shared_in_copies(way: str, used: bool) -> None:
    model, x, y = Supervised(way).eval(), torch.rand(8, 3, 4, 4), torch.arange(8)
    expected = input_gradient(Supervised(way).eval(), x, y)
    if used:
        model(torch.rand(8, 3, 4, 4))
    before = [*vars(model.kept).values()] if way == "namespace" else [*model.kept]
    torch.testing.assert_close(input_gradient(FastAttackModel(model, dtype=torch.float32), x, y), expected)
    now = [*vars(model.kept).values()] if way == "namespace" else [*model.kept]
    assert list(map(id, now)) == list(map(id, before))
