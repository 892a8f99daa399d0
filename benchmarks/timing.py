"""Measuring in turn: A B A B ..., warm-up apart, medians with quartiles, synchronised on GPUs."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

REPORTED_PACKAGES = ("torch", "torchattacks", "foolbox", "eagerpy", "numpy")


@dataclass(frozen=True)
class Way:
    """One way of doing the work that is compared.

    Attributes:
        run: does the work once; timed.
        prepare: called before every `run`, not timed (changes weights before an update, say).
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """The measured seconds of one way, warm-up left out."""

    seconds: tuple[float, ...]
    warmup_seconds: float

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile, in seconds: the spread that is reported."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was given to it; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(way: Way, device: torch.device) -> float:
    if way.prepare is not None:
        way.prepare()
    synchronize(device)
    start = time.perf_counter()
    way.run()
    synchronize(device)
    return time.perf_counter() - start


def measure_in_turn(
    ways: Mapping[str, Way | Callable[[], object]], *, device: torch.device, repeats: int = 7, warmup: int = 1
) -> dict[str, Timing]:
    """Time every way `repeats` times, in turn, so that a slow phase of the machine meets all of them alike.

    Args:
        ways: name to `Way`, or to a callable without preparation.
        device: whose work is waited for on both sides of the clock.
        repeats: timed rounds, at least 1.
        warmup: rounds before them, timed apart: compilation, allocation, caches.

    Returns:
        Name to `Timing`, in the order given.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"expected repeats of at least 1, got {repeats}; give a larger number")
    named = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    first = {name: sum(_measure(way, device) for _ in range(warmup)) for name, way in named.items()}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, way in named.items():
            seconds[name].append(_measure(way, device))
    return {name: Timing(tuple(values), first[name]) for name, values in seconds.items()}


def matrix_product(device: torch.device, dtype: torch.dtype, *, size: int = 2048) -> tuple[Way, float]:
    """A square matrix product as a way to be measured in turn with others, and its floating-point operations.

    Its speed is the peak that is reported: what the device reaches in practice, under the same clock and the same
    load, for work without any overhead.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return Way(lambda: torch.mm(left, right, out=out)), 2.0 * size**3


def gradient_flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward pass and one gradient with respect to the input `x`.

    Counted on the plain eval-mode network with frozen weights: what the attack needs, not what a way happens to do.
    The network is left as found.
    """
    states = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    leaf = x.detach().clone().requires_grad_()
    try:
        model.requires_grad_(False).eval()
        with FlopCounterMode(display=False) as counter:
            model(leaf).sum().backward()
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)
        for module, mode in modes:
            module.training = mode
    return int(counter.get_total_flops())


def _processor() -> str:
    """The processor's marketing name; `platform` knows it on some systems only."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_device(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to compare numbers: processor or GPU, its capability, threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": str(torch.version.cuda),
            "cudnn": int(torch.backends.cudnn.version() or 0),
        }
    return {
        "type": device.type,
        "name": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those not installed left out."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
