"""One short run on a GPU, in stages that can be run one by one.

Run with `python -m benchmarks.gpu.stages --stages env,smoke`; `--help` lists all options. Every stage has files of its
own, which are written after every item, so that a run which is cut off loses one item at most. What has run on a
processor with `--tiny --device cpu` is a rehearsal: its numbers mean nothing.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.gpu.compiling import compiling
from benchmarks.gpu.environment import environment
from benchmarks.gpu.items import Items
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.operators import operators
from benchmarks.gpu.prepared import prepared
from benchmarks.gpu.smoke import smoke
from benchmarks.gpu.steps import steps
from benchmarks.shared.budget import NO_TIME, Budget
from benchmarks.shared.deadline import STOPPED, OutOfTimeError, deadline
from benchmarks.shared.report import OUT, Report
from fastadv_adapters.comparison import reason

STAGES: dict[str, Callable[[Items], None]] = {
    "env": environment,
    "smoke": smoke,
    "time": steps,
    "profile": kernels,
    "micro": operators,
    "compile": compiling,
    "prepared": prepared,
}
"""What is run, in this order unless some of it is asked for."""

GRACE = 10.0
"""Seconds beyond the time of all in which the last item can be written."""

console = Console(width=180)


@dataclass(frozen=True)
class Settings:
    """What was asked for; see the options of the command."""

    stage: str
    tiny: bool
    seconds: float


def pick(wanted: str, device: torch.device) -> list[str]:
    """The stages that are asked for, with commas between.

    Raises:
        typer.BadParameter: one that there is not, or a device that is not there.
    """
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    if not names or set(names) - set(STAGES):
        raise typer.BadParameter(f"expected stages to be some of {', '.join(STAGES)}, got {wanted!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, got none: rehearse with --device cpu --tiny")
    return names


def run(stage: Callable[[Items], None], items: Items) -> str | None:
    """Run one stage; returns why it was not finished, None if it was."""
    if items.budget.left <= 0:
        return NO_TIME
    try:
        # Items are stopped by themselves, and then written: this is for what stands between them.
        with deadline(items.budget.left + GRACE):
            stage(items)
    except Exception as error:
        return reason(error)
    except OutOfTimeError:
        return STOPPED
    return None


def main(
    stages: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join(STAGES),
    seconds: Annotated[float, typer.Option(help="For all of them: what would not fit is left out.")] = 300,
    tiny: Annotated[bool, typer.Option("--tiny", help="Sizes of a rehearsal.")] = False,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Look at a GPU in stages; write JSON and Markdown for each."""
    place, budget = torch.device(device), Budget(seconds, hard=True)
    for name in pick(stages, place):
        rehearsal = " --tiny" * tiny + f" --device {device}" * (place.type != "cuda")
        command = f"python -m benchmarks.gpu.stages --stages {name}{rehearsal}"
        settings = asdict(Settings(name, tiny, seconds))
        report = Report(f"gpu-{name}", f"A GPU in stages: {name}", command, settings, place, out, console)
        if failure := run(STAGES[name], Items(name, report, budget, "tiny" if tiny else "full")):
            report.results["failure"] = failure
        report.finish()


if __name__ == "__main__":
    typer.run(main)
