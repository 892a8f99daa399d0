"""`python -m benchmarks.attack.autoattack`: AutoAttack itself, plain and fast: the same number, and how much faster?

The version "standard" as it is on the robust digits network, plain and fast from the same seeds. And on a ResNet-18 the
time of each of its four attacks, in turn: shortened, and at a budget so small that no image falls before the last step.
Likewise the AutoAttack of torchattacks, which is code of its own.
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torchattacks
import typer
from pyautoattack import AutoAttack
from rich.console import Console
from torch import Tensor, nn

from benchmarks.attack.kept import CACHE
from benchmarks.attack.networks import Subject, subject
from benchmarks.shared.networks import resnet18, settle_statistics
from benchmarks.shared.report import OUT, Part, Report, Table
from fastadv_adapters.autoattack import accelerate
from fastadv_adapters.comparison import Timing, measure_in_turn
from fastadv_adapters.torchattacks import accelerate as accelerate_torchattacks

WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "float32": {"dtype": torch.float32}, "default": {}}
"""None for the plain model, or the options of the fast one."""
ATTACKS = {"APGD-CE": "apgd", "APGD-T": "apgd_targeted", "FAB-T": "fab", "Square": "square"}
TINY = 1e-4
"""A budget at which no image falls."""
console = Console()


def adversary(net: nn.Module, way: str, *, eps: float, seed: int = 0) -> Any:
    """AutoAttack's version "standard" on a copy of a network, accelerated if the way says so."""
    options = WAYS[way]
    made = AutoAttack(copy.deepcopy(net), eps=eps, seed=seed)
    return made if options is None else accelerate(made, **options)


def shorten(made: Any, *, steps: int, targets: int, queries: int) -> Any:
    """The same with fewer steps, target classes and queries, and APGD's own schedule for them."""
    for attack in (made.apgd, made.apgd_targeted, made.fab):
        attack.n_iter = steps
    for attack in (made.apgd, made.apgd_targeted):
        attack.n_iter_2, attack.n_iter_min = (max(int(share * steps), 1) for share in (0.22, 0.06))
    for attack in (made.apgd_targeted, made.fab):
        attack.n_target_classes = targets
    made.fab.targeted = True
    made.square.n_queries = queries
    return made


def in_torchattacks(name: str, net: nn.Module, way: str, *, steps: int, targets: int, queries: int) -> Any:
    """An attack of torchattacks, shortened likewise, accelerated if the way says so."""
    options = WAYS[way]
    made = getattr(torchattacks, name)(copy.deepcopy(net), eps=TINY)
    for attack in made._autoattack.attacks if name == "AutoAttack" else [made]:
        vars(attack).update(steps=steps, n_target_classes=targets, n_queries=queries)
    return made if options is None else accelerate_torchattacks(made, **options)


def robustness(target: Subject, *, eps: float, seeds: int, shortened: dict[str, int]) -> list[dict[str, Any]]:
    """Robust accuracy in every way and from every seed, judged by the plain network, and the seconds."""
    records = []
    for seed in range(seeds):
        for way in WAYS:
            made = adversary(target.net, way, eps=eps, seed=seed)
            made = shorten(made, **shortened) if shortened else made
            start = time.perf_counter()
            found, _ = made.run_standard_evaluation(target.images, target.labels, batch_size=len(target.images))
            seconds = time.perf_counter() - start
            with torch.no_grad():
                stands = target.net(found).argmax(1) == target.labels
            records.append({"seed": seed, "way": way, "robust": stands.float().mean().item(), "seconds": seconds})
            console.print(f"seed {seed}, {way}: robust {records[-1]['robust']:.2%}, {seconds:.0f} s")
    return records


def same_number(target: Subject, records: list[dict[str, Any]], *, eps: float, shortened: dict[str, int]) -> Part:
    """The table of robust accuracies."""
    rows = [
        [str(seed), *(f"{r['robust']:.2%} in {r['seconds']:.0f} s" for r in records if r["seed"] == seed)]
        for seed in sorted({r["seed"] for r in records})
    ]
    note = f"The robust digits network, {len(target.images)} images, eps {eps:g}: robust accuracy by the plain network."
    if shortened:
        note += f" Shortened: {shortened['steps']} of 100 steps, {shortened['queries']} of 5000 queries."
    return Part([Table('Version "standard" by seed', ("seed", *WAYS), rows, note)], records)


def attack_times(x: Tensor, net: nn.Module, *, repeats: int, shortened: dict[str, int]) -> dict[str, dict[str, Timing]]:
    """Seconds of each attack of AutoAttack in each way, in turn."""
    with torch.no_grad():
        y = net(x).argmax(1)
    made = {way: shorten(adversary(net, way, eps=TINY), **shortened) for way in WAYS}

    def one(way: str, name: str) -> Callable[[], object]:
        return lambda: getattr(made[way], ATTACKS[name]).perturb(x, y)

    return {
        name: measure_in_turn({way: one(way, name) for way in WAYS}, device=x.device, repeats=repeats)
        for name in ATTACKS
    }


def times_in_torchattacks(
    x: Tensor, net: nn.Module, *, repeats: int, shortened: dict[str, int]
) -> dict[str, dict[str, Timing]]:
    """Seconds of torchattacks' AutoAttack, and of its Square alone, in each way, in turn."""
    with torch.no_grad():
        y = net(x).argmax(1)
    found = {}
    for name in ("AutoAttack", "Square"):
        ways = {way: partial(in_torchattacks(name, net, way, **shortened), x, y) for way in WAYS}
        found[name] = measure_in_turn(ways, device=x.device, repeats=repeats)
    return found


def time_table(found: dict[str, dict[str, Timing]], title: str, note: str, *, shares: dict[str, float]) -> Table:
    """Seconds and ratios, attack by attack; and of all together as long as they are in the version, if shares say so.

    Args:
        found: what was measured.
        title: of the table.
        note: below it.
        shares: how much of each attack was run.
    """
    rows = [_time_row(name, {way: timing.median for way, timing in ways.items()}) for name, ways in found.items()]
    if shares:
        whole = {way: math.fsum(ways[way].median / shares[name] for name, ways in found.items()) for way in WAYS}
        rows.append(_time_row("all, at full length", whole))
    fast = [way for way in WAYS if way != "plain"]
    return Table(title, ("attack", *WAYS, *(f"plain / {way}" for way in fast)), rows, note)


def _time_row(name: str, seconds: dict[str, float]) -> list[str]:
    ratios = [f"{seconds['plain'] / seconds[way]:.2f}" for way in WAYS if way != "plain"]
    return [name, *(f"{seconds[way]:.2f} s" for way in WAYS), *ratios]


def _seconds(found: dict[str, dict[str, Timing]]) -> dict[str, dict[str, tuple[float, ...]]]:
    return {name: {way: timing.seconds for way, timing in ways.items()} for name, ways in found.items()}


AIMS = (
    " Aims: 1.5 by default with bfloat16, 1.1 in float32, 1.1 for Square alone. What keeps the whole below 1.5 are "
    "FAB, whose exact decisions add a forward pass of the twin to each gradient pass, and Square, which takes no "
    "gradient and so runs in float32."
)


def main(
    images: Annotated[int, typer.Option(help="Digits that are attacked.")] = 200,
    eps: Annotated[float, typer.Option(help="Budget on the digits.")] = 0.15,
    seeds: Annotated[int, typer.Option(help="Runs in each way on the digits.")] = 1,
    digits_steps: Annotated[int, typer.Option(help="Steps on the digits; 0 for the version as it is.")] = 0,
    width: Annotated[int, typer.Option(help="Of the ResNet-18.")] = 64,
    batch: Annotated[int, typer.Option(help="Images of the ResNet-18.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps on the ResNet-18, of 100.")] = 5,
    targets: Annotated[int, typer.Option(help="Target classes on the ResNet-18, of 9.")] = 2,
    queries: Annotated[int, typer.Option(help="Queries of Square on the ResNet-18, of 5000.")] = 20,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for the digits network.")] = CACHE,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Run AutoAttack on plain and fast models: the same robust accuracy, and how much faster."""
    torch.set_num_threads(threads)
    shortened = {"steps": steps, "targets": targets, "queries": queries}
    settings = {
        "digits": images,
        "digits_steps": digits_steps or 100,
        "eps": eps,
        "width": width,
        "batch": batch,
        **shortened,
        "repeats": repeats,
    }
    title = "AutoAttack itself, plain and fast"
    command = (
        f"python -m benchmarks.attack.autoattack --images {images} --seeds {seeds} --digits-steps {digits_steps} "
        f"--batch {batch} --steps {steps} --targets {targets} --queries {queries} --repeats {repeats} "
        f"--threads {threads}"
    )
    report = Report("autoattack", title, command, settings, torch.device("cpu"), out, console)
    torch.manual_seed(0)
    x = torch.rand(batch, 3, 32, 32)
    net = settle_statistics(resnet18(width=width), x)
    note = (
        f"Medians of {repeats} rounds in turn. Shortened: {steps} of 100 steps, {targets} of 9 target classes, "
        f"{queries} of 5000 queries. Default: the fast model by default options, in bfloat16 on processors that "
        "have it."
    )
    of_size = f"a ResNet-18 of width {width}, {batch} images"
    shares = dict(zip(ATTACKS, (steps / 100, *(steps / 100 * targets / 9,) * 2, queries / 5000), strict=True))
    full = (
        " The last row is calculated: the sum over the four attacks of the time, divided by the share of the steps, "
        "target classes and queries that was run."
    )
    found = attack_times(x, net, repeats=repeats, shortened=shortened)
    report.add("times", Part([time_table(found, f"Seconds on {of_size}", note + full, shares=shares)], _seconds(found)))
    found = times_in_torchattacks(x, net, repeats=repeats, shortened=shortened)
    table = time_table(found, f"The AutoAttack of torchattacks: seconds on {of_size}", note + AIMS, shares={})
    report.add("torchattacks", Part([table], _seconds(found)))
    target = subject("robust", cache, images=images)
    few = {"steps": digits_steps, "targets": 9, "queries": 50 * digits_steps} if digits_steps else {}
    records = robustness(target, eps=eps, seeds=seeds, shortened=few)
    report.add("robustness", same_number(target, records, eps=eps, shortened=few))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
