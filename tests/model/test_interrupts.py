"""Exceptions and Ctrl-C in the middle of anything: both models go on, and a half-done update is never used."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from linecache import getline
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

import fastadv_adapters
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.foolbox import FastPyTorchModel
from tests.support.tools import (
    batch,
    between_the_ends,
    cosine,
    fingerprint,
    input_gradient,
    reference,
    settle,
    small_net,
)

FLOAT32: Any = {"dtype": torch.float32}
PACKAGE = str(Path(fastadv_adapters.__file__).parent)


class Fragile(nn.Module):
    """Raises from the pass on that is asked for, on the way forth or back."""

    countdown: ClassVar[dict[str, float]] = {"forward": inf, "backward": inf}
    error: BaseException

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        self.count("forward")
        y = torch.relu(self.norm(self.conv(x)))
        if y.requires_grad:
            y.register_hook(lambda grad: self.count("backward"))
        out: Tensor = self.head(y.mean((2, 3)))
        return out

    def count(self, way: str) -> None:
        self.countdown[way] -= 1
        if self.countdown[way] <= 0:
            raise Fragile.error


def mend() -> None:
    Fragile.countdown.update(forward=inf, backward=inf)


@pytest.fixture(autouse=True)
def mended() -> Iterator[None]:
    yield
    mend()


def right(fast: FastAttackModel, net: nn.Module) -> None:
    """What is computed, fast and exactly, is what ``net`` computes now."""
    x, y = batch(3)
    training = [part.training for part in net.modules()]
    fast_gradient, fast_values = input_gradient(fast, x, y), fast.view(decisions="fast")
    with torch.no_grad():
        found, found_fast = fast(x), fast_values(x)
        expected = net.eval()(x)
    assert (cosine(fast_gradient, input_gradient(net, x, y)) > 0.9999).all()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_fast, expected, rtol=1e-4, atol=1e-5)
    for part, mode in zip(net.modules(), training, strict=True):
        part.training = mode


Attack = Callable[[FastAttackModel, Tensor, Tensor], Tensor]
ATTACKS: dict[str, Attack] = {
    "torchattacks": lambda fast, x, y: torchattacks.PGD(fast, steps=6)(x, y),
    "foolbox": lambda fast, x, y: by_foolbox(FastPyTorchModel(fast, (0, 1)), x, y),
    "SafePGD": lambda fast, x, y: SafePGD(fast, eps=0.1, steps=6)(x, y),
}


def by_foolbox(model: FastPyTorchModel, x: Tensor, y: Tensor) -> Tensor:
    clipped: Tensor = foolbox.attacks.LinfPGD(steps=6)(model, x, y, epsilons=0.1)[1]
    return clipped


def seeded(attack: Attack, fast: FastAttackModel, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(2)
    return attack(fast, x, y)


ERRORS = [(KeyboardInterrupt(), 1), (KeyboardInterrupt(), 5), (MemoryError(), 1), (RuntimeError("broken"), 5)]


@pytest.mark.parametrize(("error", "at"), ERRORS, ids=lambda value: str(getattr(type(value), "__name__", value)))
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_that_is_broken_off_leaves_both_models_usable(
    error: BaseException, at: int, way: str, attack: Attack
) -> None:
    """In the self-check, which makes the first passes, or in the attack's own steps."""
    net, (x, y) = Fragile().train(), batch(3)
    before = fingerprint(net)
    fast = FastAttackModel(net, **FLOAT32, engine="eager")  # a recording would not run what raises
    if at > 1:
        input_gradient(fast, x, y)
    Fragile.error = error
    Fragile.countdown[way] = at
    with pytest.raises(type(error)):
        attack(fast, x, y)
    mend()
    assert fingerprint(net) == before
    right(fast, net)
    found, expected = (seeded(attack, model, x, y) for model in (fast, FastAttackModel(net, **FLOAT32, engine="eager")))
    assert not torch.equal(found, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- at every line of the package -------------------------------------------------------------------------------------


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th line that the package runs; counts the lines that it did run.

    Python looks for interrupts at calls and jumps back, and so never between the body of a `with` block and `__exit__`.
    A tracer could raise there, for the line of the `with` comes again: then a lock would stay held for good.
    """
    lines = [0]
    entered: set[tuple[FrameType, int]] = set()

    def leaves(frame: FrameType) -> bool:
        if not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        entered.symmetric_difference_update({(frame, frame.f_lineno)})
        return (frame, frame.f_lineno) not in entered

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not leaves(frame):
            lines[0] += 1
            if lines[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # what it would call at any time is no part of the work, but may be of the package
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
        gc.enable()
        entered.clear()  # frames hold the tracer, which would hold them


def interrupt(work: Callable[[], Any], line: int) -> bool:
    """Whether the work has run so many lines and was interrupted; the last few are not the same every time."""
    try:
        with interrupted_at(line):
            work()
    except KeyboardInterrupt:
        return True
    return False


def in_another_thread(work: Callable[[], Tensor]) -> Tensor:
    """The result, if no lock that was left held keeps that thread from it."""
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert results, "the thread waits, or has raised"
    return results[0]


def lines_of(work: Callable[[], Any]) -> int:
    with interrupted_at(-1) as lines:
        work()
    return lines[0]


def spread(total: int, most: int) -> list[int]:
    """At most so many of the lines from 1 to total, evenly."""
    return sorted({1 + i * (total - 1) // most for i in range(most)})


def new_values(net: Fragile, step: int) -> None:
    """In a way that is not noticed by itself, so that only a finished update can have seen it."""
    between_the_ends(net.conv.weight).copy_(torch.randn(4 * 27 - 2, generator=torch.Generator().manual_seed(step)))
    between_the_ends(net.norm.weight).neg_()


def new_structure(net: Fragile, step: int) -> None:
    """Noticed, and both networks are built anew."""
    new_values(net, step)
    vars(net)["step"] = step


@pytest.mark.long
@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize(("change", "most"), [(new_values, 40), (new_structure, 16)])
def test_an_update_that_is_interrupted_at_any_line_is_finished_before_the_next_pass(
    change: Callable[[Fragile, int], None], most: int, auto_update: bool
) -> None:
    net, (x, y) = Fragile().eval(), batch(3)
    fast = FastAttackModel(net, **FLOAT32, auto_update=auto_update)
    right(fast, net)
    change(net, -1)
    seen, raised = set(), 0
    for step, line in enumerate(spread(lines_of(fast.update), most)):
        old = input_gradient(fast, x, y)
        change(net, step)  # no seed of the line, which other code moves: with some weights a sample has no gradient
        new = input_gradient(net, x, y)
        raised += interrupt(fast.update, line)
        begun = fast._networks.unfinished
        seen.add(begun)
        found = in_another_thread(lambda: input_gradient(fast, x, y))
        followed = begun or (auto_update and change is new_structure)
        assert (cosine(found, new if followed else old) > 0.9999).all(), f"line {line}"
        assert not fast._networks.unfinished
        right(fast.update(), net)
    assert seen == {True, False}
    assert raised >= 0.9 * min(most, line)


class Viewing(nn.Module):
    """Makes the self-check build the fast network anew, in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x).view(len(x), -1))
        return out


@pytest.mark.filterwarnings("ignore:.*contiguous layout")
def test_a_self_check_that_is_interrupted_at_any_line_is_made_again() -> None:
    net, (x, y) = Viewing().eval(), batch(3)
    before, expected = fingerprint(net), input_gradient(net, x, y)
    state = torch.get_rng_state()
    first, raised = FastAttackModel(net, **FLOAT32), 0
    for line in spread(lines_of(lambda: input_gradient(first, x, y)), 40):
        fast = FastAttackModel(net, **FLOAT32)
        raised += interrupt(lambda fast=fast: input_gradient(fast, x, y), line)  # type: ignore[misc]
        found = in_another_thread(lambda fast=fast: input_gradient(fast, x, y))  # type: ignore[misc]
        assert (cosine(found, expected) > 0.9999).all(), f"line {line}"
        right(fast, net)
    assert raised >= 36
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_pass_that_is_interrupted_at_any_line_changes_nothing(dtype: torch.dtype) -> None:
    net, (x, y) = Fragile().eval(), batch(3)
    fast, before = FastAttackModel(net, dtype=dtype), fingerprint(net)
    expected, raised = input_gradient(fast, x, y), 0
    for _ in range(2):  # later passes run fewer lines
        input_gradient(fast, x, y)
    for line in spread(lines_of(lambda: input_gradient(fast, x, y)), 100):
        raised += interrupt(lambda: input_gradient(fast, x, y), line)
        found = in_another_thread(lambda: input_gradient(fast, x, y))
        assert torch.equal(found, expected), f"line {line}"
    assert raised >= 90
    assert fingerprint(net) == before


@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("structural", [True, False])
def test_an_interrupted_update_is_never_used(
    auto_update: bool, structural: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, y) = small_net(), batch()
    fast = FastAttackModel(net, **FLOAT32, auto_update=auto_update)
    input_gradient(fast, x, y)
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    if structural:
        vars(net)["flag"] = True

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastadv_adapters.networks.pair.build_fast", interrupt)
        patch.setattr(fast._networks.folded.refreshes[2].__class__, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fast.update()
    assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.9999).all()
