"""`python -m benchmarks.attack.evaluating`: passes, kills and the reference, of `evaluate` on the digits networks."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from pyautoattack import AutoAttack
from rich.console import Console
from torch import Tensor, nn

from benchmarks.attack.autoattack import TINY, shorten
from benchmarks.attack.kept import CACHE
from benchmarks.attack.networks import Subject, subject
from benchmarks.shared.networks import resnet18, settle_statistics
from fastadv_adapters import FastAttackModel, FastAttackOptions, Report, SafePGD, evaluate
from fastadv_adapters.comparison import measure_in_turn

EPS = 0.2
STEPS = 50
BOUND = {"normal": 0.15, "robust": 0.75}
"""The share of passes that may be needed at most."""
FLOAT32: FastAttackOptions = {"dtype": torch.float32}
SIZES = (1, 7, 128)

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()


class Rows:
    """Counts the rows of all passes through the fast model, copies that only fill up a batch among them."""

    def __init__(self, fast: FastAttackModel) -> None:
        self._fast, self.forward = fast, 0
        fast.reset_gradient_stats()
        fast.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.forward += len(inputs[0])

    @property
    def all(self) -> int:
        """Forward and backward."""
        return self.forward + self._fast.gradient_stats.samples


def passes_of_fixed_batches(fast: FastAttackModel, x: Tensor, y: Tensor, batch_size: int = 128) -> int:
    """Rows of all passes of the same attack in fixed batches without early stop."""
    counted = Rows(fast)
    attack = SafePGD(fast, eps=EPS, steps=STEPS, generator=torch.Generator().manual_seed(0))
    for first in range(0, len(x), batch_size):
        attack(x[first : first + batch_size], y[first : first + batch_size])
    return counted.all


def share_of_passes(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Report]:
    """Passes of `evaluate` as a share of those of fixed batches."""
    fixed = passes_of_fixed_batches(FastAttackModel(net, **FLOAT32), x, y)
    fast = FastAttackModel(net, **FLOAT32)
    counted = Rows(fast)
    report = evaluate(fast, (x, y), f"safe-pgd-{STEPS}", eps=EPS, progress=False)
    return counted.all / fixed, report


def verdicts(report: Report) -> list[tuple[int, str | None, float | None]]:
    """Who was broken by what, within which budget."""
    return [(row.index, row.broken_by, row.eps) for row in report.samples]


@app.command()
def passes(folder: Annotated[Path, typer.Option(help="Holds trained networks.")] = CACHE, images: int = 397) -> None:
    """Passes that a batch that is kept full needs, and whether its size matters."""
    for name, most in BOUND.items():
        one = subject(name, folder, images=images)
        share, report = share_of_passes(one.net, one.images, one.labels)
        console.print(f"{name}: {100 * share:.1f} % of the passes (at most {100 * most:.0f} %); {report}")
        same = [
            verdicts(
                evaluate(
                    one.net,
                    (one.images, one.labels),
                    f"safe-pgd-{STEPS}",
                    eps=EPS,
                    batch_size=size,
                    options=FLOAT32,
                    progress=False,
                )
            )
            == verdicts(report)
            for size in SIZES
        ]
        console.print(f"{name}: same verdicts for batch sizes {SIZES}: {same}")
        if share > most or not all(same):
            raise typer.Exit(1)


@app.command()
def once(folder: Path, output: Path, images: int, log: Path) -> None:
    """One evaluation that may be killed; indices of finished samples are appended to `log`."""
    torch.set_num_threads(1)
    with log.open("a", buffering=1) as lines:
        _evaluated(subject("robust", folder, images=images), output, lambda row: lines.write(f"{row.index}\n"))


@app.command()
def kills(
    folder: Annotated[Path, typer.Option(help="Holds trained networks.")] = CACHE,
    images: int = 397,
    times: int = 20,
    seed: int = 0,
) -> None:
    """Kill evaluations at random moments, let each go on, and compare with one that was let alone."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        _ran(folder, Path(place, "whole"), images, None)
        whole = _as_compared(Report.load(Path(place, "whole")))
        for number in range(times):
            output = Path(place, str(number))
            killed = _ran(folder, output, images, (generator.randrange(images), generator.uniform(0, 0.5)))
            _ran(folder, output, images, None)
            told = Path(place, f"{number}.log").read_text().split()
            same, again = _as_compared(Report.load(output)) == whole, len(told) - len(set(told))
            console.print(f"{number}: killed with {killed} lines; same report: {same}; computed again: {again}")
            if not same or again:
                raise typer.Exit(1)


@app.command()
def faster(
    images: int = 32,
    width: int = 64,
    steps: Annotated[int, typer.Option(help="Steps, of 100; Square is shortened likewise.")] = 5,
    repeats: int = 2,
    threads: int = 1,
) -> None:
    """The preset "standard" beside pyautoattack on a plain ResNet-18, both shortened, at a budget that breaks none.

    The shares of its attacks in the time are those of the full length; so building and the first calls weigh more here.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.rand(images, 3, 32, 32)
    net = settle_statistics(resnet18(width=width), x)
    with torch.no_grad():
        y = net(x).argmax(1)
    short = {"steps": steps, "targets": 9, "queries": 50 * steps}

    def made(*arguments: object, **options: object) -> object:
        return shorten(AutoAttack(*arguments, **options), **short)

    def plain() -> None:
        shorten(AutoAttack(net, eps=TINY, seed=0), **short).run_standard_evaluation(x, y, batch_size=images)

    def fast() -> None:
        with mock.patch("pyautoattack.AutoAttack", made):
            report = evaluate(net, (x, y), "standard", eps=TINY, batch_size=images, progress=False)
        if report.robust_accuracy != 1:
            raise typer.Exit(1)

    found = measure_in_turn({"plain": plain, "fast": fast}, device=x.device, repeats=repeats)
    seconds = {way: timing.median for way, timing in found.items()}
    ratio = seconds["plain"] / seconds["fast"]
    console.print(f"pyautoattack {seconds['plain']:.1f} s, here {seconds['fast']:.1f} s: {ratio:.2f} times as fast")
    if ratio <= 1:
        raise typer.Exit(1)


@app.command()
def standard(
    folder: Annotated[Path, typer.Option(help="Holds trained networks.")] = CACHE, images: int = 100, eps: float = EPS
) -> None:
    """The preset "standard" beside pyautoattack itself on the plain model."""
    one = subject("robust", folder, images=images)
    x, y = one.images, one.labels
    begun = time.perf_counter()
    adversarial, _ = AutoAttack(one.net, eps=eps, seed=0).run_standard_evaluation(x, y, batch_size=128)
    theirs, taken = (one.net(adversarial).argmax(1) == y).float().mean().item(), time.perf_counter() - begun
    begun = time.perf_counter()
    report = evaluate(one.net, (x, y), "standard", eps=eps, options=FLOAT32, progress=False)
    ours = time.perf_counter() - begun
    console.print(f"pyautoattack: {100 * theirs:.1f} % in {taken:.0f} s; here {ours:.0f} s: {report}")
    if abs(report.robust_accuracy - theirs) > 0.01:
        raise typer.Exit(1)


def _evaluated(one: Subject, output: Path | None, callback: object) -> Report:
    return evaluate(
        one.net,
        (one.images, one.labels),
        ["safe-pgd-ce-50", "safe-pgd-targeted-20"],
        eps=EPS,
        batch_size=16,
        options=FLOAT32,
        output=output,
        progress=False,
        callback=callback,  # type: ignore[arg-type]
    )


def _as_compared(report: Report) -> list[dict[str, object]]:
    """All that does not depend on time or on who stood beside whom."""
    left_out = ("seconds", "forward", "backward")
    return [{k: v for k, v in row.as_dict().items() if k not in left_out} for row in report.samples]


def _ran(folder: Path, output: Path, images: int, moment: tuple[int, float] | None) -> int:
    """Evaluate in another process; returns how many samples are finished.

    It is killed so many seconds after so many samples are finished, if a moment is given.
    """
    arguments = [str(folder), str(output), str(images), str(output.with_suffix(".log"))]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.attack.evaluating", "once", *arguments]) as process:
        if moment is not None:
            while process.poll() is None and not ((output / "header.json").exists() and _lines(output) >= moment[0]):
                time.sleep(0.01)
            time.sleep(moment[1])
            process.kill()
        status = process.wait()
    if moment is None and status != 0:
        raise typer.Exit(1)
    return _lines(output)


def _lines(output: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in output.glob("rows*.jsonl"))


if __name__ == "__main__":
    app()
