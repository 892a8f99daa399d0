"""The rows of the benchmark: every way to run the same attack, those that a user could go instead and ours."""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import foolbox
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from benchmarks.shared.recipe import RecipeModel
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.attack.losses import resolve_loss
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.modules.precision import HALF, auto_dtype

EPS = 8 / 255
"""The budget when speed is measured; it depends on it in one way alone, which stops early."""

UNHARMED = 1e-5
"""A budget at which no sample falls, for that way: what it costs where it helps nothing."""

FIXED_SCALE = 2.0**16
"""What PyTorch's own gradient scaler starts with."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setup:
    """How a network is attacked.

    Attributes:
        eps: budget in L-infinity.
        steps: of projected gradient descent.
        device: where the network and the images are.
    """

    eps: float
    steps: int
    device: torch.device

    @property
    def alpha(self) -> float:
        """The size of a step."""
        return 2.5 * self.eps / self.steps


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What torchattacks maximises: the mean over the batch."""
    return F.cross_entropy(logits, labels)


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What foolbox maximises: the sum over the batch."""
    return F.cross_entropy(logits, labels, reduction="sum")


def safe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What SafePGD maximises."""
    return resolve_loss("ce")(logits, labels).sum()


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one way of attacking it.

    Attributes:
        run: images (N, ...) and labels (N,) to adversarial images.
        network: what the attack takes its gradient through, images to logits.
        loss: what it maximises.
        update: what has to be done after a change of the weights; None where nothing has.
        context: what all of it runs in.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    network: Callable[[Tensor], Tensor]
    loss: Loss = mean_loss
    update: Callable[[], object] | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        """One attack on a batch."""
        with self.context():
            return self.run(x, y)

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """The gradient that the attack takes at x, of x's shape."""
        leaf = x.detach().clone().requires_grad_()
        with self.context():
            return torch.autograd.grad(self.loss(self.network(leaf), y), leaf)[0]


def torchattacks_pgd(model: nn.Module, setup: Setup, **rest: Any) -> Prepared:
    """torchattacks.PGD on a model of any kind."""
    attack = torchattacks.PGD(model, eps=setup.eps, alpha=setup.alpha, steps=setup.steps)
    return Prepared(attack, model, update=getattr(model, "update", None), **rest)


def foolbox_pgd(model: foolbox.PyTorchModel, network: nn.Module, setup: Setup) -> Prepared:
    """LinfPGD of foolbox with the same steps."""
    attack = foolbox.attacks.LinfPGD(abs_stepsize=setup.alpha, steps=setup.steps)

    def run(x: Tensor, y: Tensor) -> Tensor:
        clipped: Tensor = attack(model, x, y, epsilons=setup.eps)[1]
        return clipped

    return Prepared(run, network, sum_loss, update=getattr(network, "update", None))


def foolbox_plain(model: nn.Module, setup: Setup) -> Prepared:
    """LinfPGD of foolbox on its own model."""
    return foolbox_pgd(foolbox.PyTorchModel(model, (0, 1), setup.device), model, setup)


def foolbox_fast(model: nn.Module, setup: Setup, *, dtype: torch.dtype) -> Prepared:
    """LinfPGD of foolbox on our model."""
    fast = FastPyTorchModel(model, (0, 1), setup.device, dtype=dtype)
    return foolbox_pgd(fast, fast.fast, setup)


def safe_pgd(model: nn.Module, setup: Setup, *, dtype: torch.dtype, early_stop: bool) -> Prepared:
    """The built-in attack on our model."""
    fast = FastAttackModel(model, dtype=dtype)
    attack = SafePGD(fast, eps=setup.eps, steps=setup.steps, early_stop=early_stop)
    seen = fast.view(decisions="fast", logits_dtype=torch.float64)
    return Prepared(attack, seen, safe_loss, update=fast.update)


def autocast(model: nn.Module, setup: Setup, *, dtype: torch.dtype) -> Prepared:
    """torchattacks.PGD in an autocast region."""
    return torchattacks_pgd(model, setup, context=lambda: torch.autocast(setup.device.type, dtype))


def compiled(model: nn.Module, setup: Setup, *, dtype: torch.dtype, mode: str = "default") -> Prepared:
    """torchattacks.PGD on the model as torch.compile makes it, in half precision in an autocast region."""
    # Of a copy: compiling marks the model that it is given, and fast models of that would be built anew.
    faster: nn.Module = torch.compile(copy.deepcopy(model), mode=mode)  # type: ignore[assignment]
    return autocast(faster, setup, dtype=dtype) if dtype in HALF else torchattacks_pgd(faster, setup)


def recipe(model: nn.Module, setup: Setup, *, dtype: torch.dtype, loss_scale: float = 1.0) -> Prepared:
    """torchattacks.PGD on a model prepared by the published recipe."""
    half = dtype if dtype in HALF else None
    return torchattacks_pgd(RecipeModel(model, dtype=half, loss_scale=loss_scale), setup)


def ours(model: nn.Module, setup: Setup, **options: Any) -> Prepared:
    """torchattacks.PGD on our model; options as of FastAttackModel."""
    return torchattacks_pgd(FastAttackModel(model, **options), setup)


@dataclass(frozen=True)
class Row:
    """One way of running the attack.

    Attributes:
        key: its name in options and in JSON.
        label: its name in tables.
        dtype: what its convolutions and products run in.
        build: makes a network ready.
        core: whether it is measured on every network if not all is to be, or on the first alone.
        compiles: whether it takes a compiler's time to begin.
        ours: whether it runs through this package.
        timed: whether its speed is measured; otherwise only whether it is right.
        eps: the budget when its speed is measured.
    """

    key: str
    label: str
    dtype: torch.dtype
    build: Callable[[nn.Module, Setup], Prepared]
    core: bool = True
    compiles: bool = False
    ours: bool = field(default=False, kw_only=True)
    timed: bool = field(default=True, kw_only=True)
    eps: float = field(default=EPS, kw_only=True)


PLAIN, FOOLBOX = "plain", "foolbox"
"""The rows that others are compared with."""


def short(dtype: torch.dtype) -> str:
    """A dtype's name without the package's."""
    return str(dtype).removeprefix("torch.")


def half_of(device: torch.device) -> torch.dtype | None:
    """The half precision that the device has in hardware, if any."""
    dtype = auto_dtype(device)
    return dtype if dtype in HALF else None


def every_row(device: torch.device) -> tuple[Row, ...]:
    """All rows for a device, in the order in which they are shown; those that are only judged come last."""
    hardware = half_of(device)
    rows = [
        Row(PLAIN, "torchattacks", torch.float32, torchattacks_pgd),
        *_rivals(torch.float32, device),
        *(_rivals(hardware, device) if hardware else ()),
        Row(FOOLBOX, "foolbox", torch.float32, foolbox_plain),
        *_own(torch.float32, device, default=hardware is None),
        *(_own(hardware, device, default=True) if hardware else ()),
    ]
    others = HALF if device.type == "cpu" else ()
    return (*rows, *(row for dtype in others if dtype != hardware for row in _judged_alone(dtype)))


def _rivals(dtype: torch.dtype, device: torch.device) -> Iterable[Row]:
    """What a user could do in this dtype without us, beyond the plain attack."""
    name, half = short(dtype), dtype in HALF
    make, after = partial(recipe, dtype=dtype), f", {name}" if half else ""
    if half:
        yield Row(f"autocast-{name}", f"torchattacks, autocast, {name}", dtype, partial(autocast, dtype=dtype))
    label = f"torchattacks, torch.compile{', autocast' if half else ''}{after}"
    yield Row(f"compile-{name}", label, dtype, partial(compiled, dtype=dtype), core=False, compiles=True)
    if device.type == "cuda":  # elsewhere this mode compiles to the same
        label = f'torchattacks, torch.compile, mode="reduce-overhead"{", autocast" if half else ""}{after}'
        build = partial(compiled, dtype=dtype, mode="reduce-overhead")
        yield Row(f"compile-overhead-{name}", label, dtype, build, core=False, compiles=True)
    yield Row(f"recipe-{name}", f"recipe, {name}", dtype, make, core=half)
    if half:
        scaled = partial(make, loss_scale=FIXED_SCALE)
        yield Row(f"recipe-{name}-scaled", f"recipe, {name}, loss scale 2^16", dtype, scaled)


def _own(dtype: torch.dtype, device: torch.device, *, default: bool) -> Iterable[Row]:
    """Ours in this dtype; `default` says whether it is the one that a user gets without asking."""
    name = short(dtype)
    for engine in ("eager", "compile", *(("cudagraph",) if device.type == "cuda" else ())):
        build = partial(ours, dtype=dtype, engine=engine)
        # In the other dtype one engine will do: the eager one, which is the simplest.
        core, compiles = engine == "eager" or (default and engine != "compile"), engine == "compile"
        yield Row(f"ours-{engine}-{name}", f"ours, {engine}, {name}", dtype, build, core, compiles, ours=True)
    if dtype in HALF:
        yield _unscaled(dtype)
    build = partial(foolbox_fast, dtype=dtype)
    yield Row(f"foolbox-ours-{name}", f"foolbox, ours, {name}", dtype, build, core=default, ours=True)
    if default:
        safe = partial(safe_pgd, dtype=dtype)
        yield Row("safe-pgd", f"SafePGD, {name}", dtype, partial(safe, early_stop=False), ours=True)
        stop, label = partial(safe, early_stop=True), f"SafePGD, early stop, {name}"
        yield Row("safe-pgd-early", label, dtype, stop, core=False, ours=True, eps=UNHARMED)


def _judged_alone(dtype: torch.dtype) -> Iterable[Row]:
    """Rows in a half precision that the device lacks: far too slow to be timed, but as right or as wrong."""
    name = short(dtype)
    make = partial(recipe, dtype=dtype)
    yield Row(f"autocast-{name}", f"torchattacks, autocast, {name}", dtype, partial(autocast, dtype=dtype), timed=False)
    yield Row(f"recipe-{name}", f"recipe, {name}", dtype, make, timed=False)
    scaled = partial(make, loss_scale=FIXED_SCALE)
    yield Row(f"recipe-{name}-scaled", f"recipe, {name}, loss scale 2^16", dtype, scaled, timed=False)
    build = partial(ours, dtype=dtype, engine="eager")
    yield Row(f"ours-eager-{name}", f"ours, eager, {name}", dtype, build, ours=True, timed=False)
    yield _unscaled(dtype)


def _unscaled(dtype: torch.dtype) -> Row:
    """Ours with one trick switched off that costs no time, but without which it is not right."""
    key, label = f"ours-unscaled-{short(dtype)}", f"ours, no loss scaling, {short(dtype)}"
    return Row(key, label, dtype, partial(ours, dtype=dtype, loss_scale=None), ours=True, timed=False)


SELECTIONS = ("all", "core", "lean")
"""Rows can be asked for by these words: "lean" is all on the first network, and the core on the others."""


def choose(rows: Sequence[Row], wanted: str, *, first: bool = True) -> tuple[Row, ...]:
    """The rows that are asked for: one of SELECTIONS, or keys with commas between; the plain one is always among them.

    Args:
        rows: all that there are.
        wanted: what is asked for.
        first: whether it is for the first network.

    Raises:
        ValueError: a key that no row has.
    """
    if wanted in SELECTIONS:
        every = wanted == "all" or (wanted == "lean" and first)
        return tuple(row for row in rows if row.core or every)
    keys = {PLAIN, *(key.strip() for key in wanted.split(",") if key.strip())}
    unknown = keys - {row.key for row in rows}
    if unknown:
        known, words = ", ".join(row.key for row in rows), ", ".join(f'"{word}"' for word in SELECTIONS)
        raise ValueError(f"expected rows to be {words} or some of {known}, got {', '.join(sorted(unknown))}")
    return tuple(row for row in rows if row.key in keys)
