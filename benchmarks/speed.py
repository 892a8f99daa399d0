"""How fast attacks and updates are, plain and fast, in one process and in turn.

Run with `python -m benchmarks.speed`, or `python -m benchmarks.speed --help` for its options.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import foolbox
import torch
import torchattacks
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.networks import WideResNet, resnet18, settle_statistics
from benchmarks.recipe import RecipeModel
from benchmarks.report import OUT, Table, deliver, milliseconds, timing_record
from benchmarks.timing import Timing, Way, gradient_flops, matrix_product, measure_in_turn
from fastadv_adapters import FastAttackModel
from fastadv_adapters.foolbox import FastPyTorchModel
from fastadv_adapters.precision import auto_dtype

EPS = 8 / 255
"""The budget of the attacks; speed does not depend on it."""

PLAIN, FLOAT32, AUTO = "plain", "fast, float32", "fast, default dtype"
MATRIX = "matrix product, float32"
UPDATE, COPY, AGAIN = "update()", "plain copy, channels-last", "trace, fold, freeze, lay out again"

console = Console()


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often; see the options of the command."""

    width: int
    batch: int
    steps: int
    repeats: int
    warmup: int
    wide_depth: int
    wide_width: int
    update_repeats: int
    matrix_size: int


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Callable[[], object]:
    """One torchattacks.PGD on a batch, ready to be run."""
    attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    return lambda: attack(x, y)


def foolbox_pgd(model: foolbox.PyTorchModel, x: Tensor, y: Tensor, *, steps: int) -> Callable[[], object]:
    """One foolbox LinfPGD on a batch, ready to be run."""
    attack = foolbox.attacks.LinfPGD(steps=steps)
    return lambda: attack(model, x, y, epsilons=EPS)


def measure_attacks(settings: Settings, device: torch.device) -> tuple[Table, dict[str, Any]]:
    """PGD of both libraries on a ResNet-18 for 32x32 images, and the share of the matrix peak that is reached."""
    x = torch.rand(settings.batch, 3, 32, 32, device=device)
    y = torch.randint(10, (settings.batch,), device=device)
    model = settle_statistics(resnet18(width=settings.width).to(device), x)
    float32, auto = FastAttackModel(model, dtype=torch.float32), FastAttackModel(model)
    product, product_flops = matrix_product(device, torch.float32, size=settings.matrix_size)
    steps, bounds = settings.steps, (0.0, 1.0)
    groups: dict[str, dict[str, Way | Callable[[], object]]] = {
        "torchattacks.PGD": {
            PLAIN: torchattacks_pgd(model, x, y, steps=steps),
            FLOAT32: torchattacks_pgd(float32, x, y, steps=steps),
            AUTO: torchattacks_pgd(auto, x, y, steps=steps),
            MATRIX: product,
        },
        "foolbox LinfPGD": {
            PLAIN: foolbox_pgd(foolbox.PyTorchModel(model, bounds, device), x, y, steps=steps),
            FLOAT32: foolbox_pgd(FastPyTorchModel(model, bounds, device, dtype=torch.float32), x, y, steps=steps),
            AUTO: foolbox_pgd(FastPyTorchModel(model, bounds, device), x, y, steps=steps),
        },
    }
    timings = {
        attack: measure_in_turn(ways, device=device, repeats=settings.repeats, warmup=settings.warmup)
        for attack, ways in groups.items()
    }
    peak = product_flops / timings["torchattacks.PGD"].pop(MATRIX).median
    flops = steps * gradient_flops(model, x)
    return _attack_table(settings, timings, flops, peak, auto_dtype(device)), {
        "timings": {attack: {way: timing_record(t) for way, t in ways.items()} for attack, ways in timings.items()},
        "ratios": {attack: _ratios(ways, PLAIN) for attack, ways in timings.items()},
        "flops": flops,
        "matrix_flops_per_s": peak,
        "share_of_matrix_peak": {
            attack: {way: flops / t.median / peak for way, t in ways.items()} for attack, ways in timings.items()
        },
    }


def _ratios(timings: Mapping[str, Timing], base: str) -> dict[str, float]:
    """How many times faster than `base` each way is."""
    return {way: timings[base].median / timing.median for way, timing in timings.items()}


def _attack_table(
    settings: Settings,
    timings: Mapping[str, Mapping[str, Timing]],
    flops: float,
    peak: float,
    dtype: torch.dtype,
) -> Table:
    images = settings.batch * settings.steps
    rows = [
        (
            f"{attack}, {way}",
            milliseconds(timing),
            f"{images / timing.median:.4g}",
            f"{ratio:.2f}x",
            f"{flops / timing.median / peak:.0%}",
        )
        for attack, ways in timings.items()
        for (way, timing), ratio in zip(ways.items(), _ratios(ways, PLAIN).values(), strict=True)
    ]
    return Table(
        f"PGD-{settings.steps} on ResNet-18 of width {settings.width}, batch {settings.batch}",
        ("way", "ms, median (quartiles)", "images x steps per s", "speed to plain", "share of matrix peak"),
        rows,
        f"The default dtype here is {str(dtype).removeprefix('torch.')}. The matrix peak is that of float32 products "
        f"of size {settings.matrix_size}, {peak / 1e9:.4g} GFLOP/s, in turn with torchattacks.PGD; the work is "
        f"that of {settings.steps} forward passes and input gradients.",
    )


def tensor_addresses(fast: FastAttackModel) -> list[int]:
    """The storage addresses of all tensors that the fast network and the twin run on."""
    networks = fast._networks
    parts = [*networks.fast.network.modules(), *networks.twin.engine.network.modules()]
    frozen = [t for part in parts for t in vars(part).get("scale_and_shift", {}).values()]
    registered = [t for part in parts for t in (*part.parameters(False), *part.buffers(False))]
    return sorted(t.data_ptr() for t in (*frozen, *registered))


def plain_copy(model: nn.Module, *, channels_last: bool) -> Callable[[], None]:
    """The floor of an update: every parameter copied in place into its own tensor of the layout that is used."""
    pairs = [
        (p.detach(), torch.empty_like(p, memory_format=torch.channels_last if channels_last and p.ndim == 4 else None))
        for p in model.parameters()
    ]

    def copy() -> None:
        with torch.no_grad():
            for source, target in pairs:
                target.copy_(source)

    return copy


def measure_update(settings: Settings, device: torch.device) -> tuple[Table, dict[str, Any]]:
    """`update()` on a wide residual network, after a change of all weights, between its floor and the recipe's way."""
    x = torch.rand(4, 3, 32, 32, device=device)
    model = settle_statistics(WideResNet(depth=settings.wide_depth, width=settings.wide_width).to(device), x)
    fast = FastAttackModel(model, dtype=torch.float32)
    recipe = RecipeModel(model)
    parameters = list(model.parameters())

    def change() -> None:
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0001)  # type: ignore[arg-type]

    before = tensor_addresses(fast)
    timings = measure_in_turn(
        {
            UPDATE: Way(fast.update, change),
            COPY: Way(plain_copy(model, channels_last=True), change),
            "plain copy, contiguous": Way(plain_copy(model, channels_last=False), change),
            AGAIN: Way(recipe.update, change),
        },
        device=device,
        repeats=settings.update_repeats,
        warmup=settings.warmup,
    )
    unchanged = tensor_addresses(fast) == before
    own, floor = timings[UPDATE].median, timings[COPY].median
    rows = [
        (way, milliseconds(timing), f"{timing.median / floor:.2f}x", f"{timing.median / own:.2f}x")
        for way, timing in timings.items()
    ]
    table = Table(
        f"Update of a WRN-{settings.wide_depth}-{settings.wide_width} after a change of all weights",
        ("way", "ms, median (quartiles)", "to the plain copy", "to update()"),
        rows,
        f"The addresses of all {len(before)} tensors are {'unchanged' if unchanged else 'CHANGED'} by update().",
    )
    return table, {
        "timings": {way: timing_record(timing) for way, timing in timings.items()},
        "update_to_plain_copy": own / floor,
        "tracing_again_to_update": timings[AGAIN].median / own,
        "addresses_unchanged": unchanged,
    }


def main(
    width: Annotated[int, typer.Option(help="Channels of the ResNet-18's first stage.")] = 64,
    batch: Annotated[int, typer.Option(help="Images per attack.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    repeats: Annotated[int, typer.Option(help="Timed rounds of the attacks.")] = 7,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 1,
    wide_depth: Annotated[int, typer.Option(help="Depth of the wide residual network, 6 n + 4.")] = 28,
    wide_width: Annotated[int, typer.Option(help="Its widening factor.")] = 10,
    update_repeats: Annotated[int, typer.Option(help="Timed rounds of the update.")] = 15,
    matrix_size: Annotated[int, typer.Option(help="Rows and columns of the matrix product.")] = 2048,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 leaves PyTorch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Measure PGD of torchattacks and foolbox, and the update, plain and fast, in turn; write JSON and Markdown."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = Settings(width, batch, steps, repeats, warmup, wide_depth, wide_width, update_repeats, matrix_size)
    place = torch.device(device)
    with console.status("attacks"):
        attack_table, attacks = measure_attacks(settings, place)
    with console.status("update"):
        update_table, update = measure_update(settings, place)
    deliver(
        "speed",
        title="Speed of attacks and updates",
        tables=[attack_table, update_table],
        results={"attacks": attacks, "update": update},
        settings=asdict(settings),
        device=place,
        out=out,
        console=console,
    )


if __name__ == "__main__":
    typer.run(main)
