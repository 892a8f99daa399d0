"""What each trick brings: all of them, and all but one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.report import Part, Table, milliseconds, timing_record
from benchmarks.shared.rows import EPS, Prepared, Setup, foolbox_plain, half_of, ours, torchattacks_pgd
from benchmarks.speed.cases import Case
from benchmarks.speed.measurement import Effort
from fastadv_adapters import FastAttackModel
from fastadv_adapters.comparison import Timing, Way, measure_in_turn, reason
from fastadv_adapters.kernels import prepacked, shapes
from fastadv_adapters.modules import precision

ALL = "ours, all tricks"
HALF_NOR_WINOGRAD = "without half precision, nor Winograd's algorithm"


@contextmanager
def nothing_cast_ahead() -> Iterator[None]:
    """Fast models that are built inside leave the casting of their weights to autocast, in every forward pass."""
    with mock.patch.dict(precision._CAST_AHEAD, clear=True):
        yield


class _Nothing:
    """In the place of weights that are laid out ahead."""

    def find(self, *args: object) -> None:
        """Let PyTorch lay them out."""


@contextmanager
def nothing_laid_out_ahead() -> Iterator[None]:
    """Fast models that are built inside leave the layout of their weights to oneDNN, in every pass."""
    with mock.patch.object(shapes, "Prepacked", _Nothing):
        yield


class _Direct(prepacked.Prepacked):
    """Weights for oneDNN's kernels alone."""

    pays = staticmethod(lambda layer, shape: False)


@contextmanager
def nothing_by_winograd() -> Iterator[None]:
    """Fast models that are built inside compute no convolution by Winograd's algorithm."""
    with mock.patch.object(shapes, "Prepacked", _Direct):
        yield


@dataclass(frozen=True)
class Variant:
    """One way with something switched off.

    Attributes:
        base: name of the variant in which it is on.
        build: makes a network ready.
        around: a context to build it in.
    """

    base: str
    build: Callable[[nn.Module, Setup], Prepared]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def frozen(build: Callable[[nn.Module, Setup], Prepared], model: nn.Module, setup: Setup) -> Prepared:
    """As `build`, on a copy of the model whose parameters need no gradient."""
    return build(copy.deepcopy(model).requires_grad_(False), setup)


def variants(device: torch.device, engine: str) -> dict[str, Variant]:
    """Name to variant. Freezing cannot be switched off in ours, so it is switched on in the plain attacks instead."""
    half = half_of(device) is not None
    without: dict[str, dict[str, Any]] = {
        "without half precision": {"dtype": torch.float32},
        "without folding of batch norm": {"fuse_bn": False},
        "without channels-last": {"channels_last": False},
        "without loss scaling": {"loss_scale": None},
        "without looking for changes": {"auto_update": False},
        f"without the engine {engine}": {"engine": "eager"},
    }
    if not half:
        del without["without half precision"]
    if engine == "eager":
        del without["without the engine eager"]
    found = {ALL: Variant(ALL, ours)}
    found.update({name: Variant(ALL, partial(ours, **options)) for name, options in without.items()})
    if half:
        found["without casting weights ahead"] = Variant(ALL, ours, nothing_cast_ahead)
    if device.type == "cpu" and engine == "eager":
        found["without laying out weights ahead"] = Variant(ALL, ours, nothing_laid_out_ahead)
        base, name = ("without half precision", HALF_NOR_WINOGRAD) if half else (ALL, "without Winograd's algorithm")
        found[name] = Variant(base, partial(ours, dtype=torch.float32), nothing_by_winograd)
    for library, build in (("torchattacks", torchattacks_pgd), ("foolbox", foolbox_plain)):
        name = f"{library}, plain, parameters frozen"
        found[name] = Variant(name, partial(frozen, build))
        found[f"{library}, plain, parameters not frozen"] = Variant(name, build)
    return found


def ablation_part(case: Case, effort: Effort, device: torch.device, *, budget: Budget, seed: int) -> Part:
    """Attack one network in all variants, in turn."""
    model, x, y = case.make(device, seed=seed)
    chosen = variants(device, FastAttackModel(model).engine)
    setup = Setup(EPS, effort.steps, device)
    ways: dict[str, Way] = {}
    failures: dict[str, str] = {}
    building = budget.share(2 / 3)
    for name, variant in chosen.items():
        if budget.hard and building.left < 0:  # what is built by then can still be timed
            failures[name] = NO_TIME
            continue
        try:
            with variant.around():
                prepared = variant.build(model, setup)
                prepared.attack(x, y)
            ways[name] = _attack(prepared, x, y)
        except Exception as error:
            failures[name] = reason(error)
    timings = measure_in_turn(ways, device=device, repeats=effort.repeats, warmup=0, budget=budget, failures=failures)
    slower = {name: _ratio(timings, name, chosen[name].base) for name in timings}
    table = Table(
        f"What each trick brings: PGD-{effort.steps} on {case.title}",
        ("way", "ms, median (quartiles)", "time, to that of its base"),
        [(name, *_told(name, timings, slower, failures)) for name in chosen],
        "Each trick alone is switched off, and the time compared with that of all tricks. Freezing cannot be switched "
        "off in ours: there, each library's attack on the plain model is compared with the same on a frozen one. "
        "Winograd's algorithm is for float32: the time without it is compared with that in float32. The row that a "
        "time is compared with is its base.",
    )
    record = {
        name: {**timing_record(timing), "base": chosen[name].base, "times_slower": slower[name]}
        for name, timing in timings.items()
    }
    return Part([table], {**record, **{name: {"failure": why} for name, why in failures.items()}})


def _attack(prepared: Prepared, x: torch.Tensor, y: torch.Tensor) -> Way:
    return Way(lambda: prepared.attack(x, y))


def _ratio(timings: dict[str, Timing], name: str, base: str) -> float | None:
    return timings[name].median / timings[base].median if base in timings else None


def _told(
    name: str, timings: dict[str, Timing], slower: dict[str, float | None], failures: dict[str, str]
) -> tuple[str, str]:
    if name not in timings:
        return failures.get(name, "not measured"), ""
    ratio = slower[name]
    return milliseconds(timings[name]), f"{ratio:.2f}x" if ratio else ""
