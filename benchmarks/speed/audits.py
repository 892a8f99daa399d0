"""What audits cost of an attack, and whether one sends a network of the benchmark back to float32 without need.

Run with `python -m benchmarks.speed.audits`. An audit comes with the first backward pass of each kind of call, and then
every 256 passes, or every 128 if the weights have changed meanwhile: once in a first attack of 50 steps, and once in
several later ones.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torchattacks
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.shared.correctness import confident_digits
from benchmarks.shared.report import OUT, Part, Report, Table
from benchmarks.speed.cases import cases
from fastadv_adapters import FastAttackModel, FastAttackWarning
from fastadv_adapters.networks.auditing import Auditor
from fastadv_adapters.networks.schedule import PASSES, SOON

STEPS = 50  # of the attack whose share is told
PLAIN = 3  # steps of the plain attack beside it
IN_A_ROW = 10  # attacks, as on some hundred images
EPS = 8 / 255
console = Console()


class Louder(nn.Module):
    """A network with its logits multiplied."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) * self.factor
        return logits


def subjects(batch: int, epochs: int, only: str, *, tiny: bool) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """The confident digits networks, and the four of the benchmark: name, network, images, labels."""
    if any(only in f"digits network, logits x {factor}" for factor in (1, 16)):
        digits = confident_digits(torch.device("cpu"), images=batch, epochs=epochs, seed=0)
        x, y = digits.data.test_images[:batch], digits.data.test_labels[:batch]
        for factor in (1, 16):
            yield f"digits network, logits x {factor}", Louder(digits.model, factor).eval(), x, y
    for case in cases("tiny" if tiny else "small"):
        if only in case.label:
            model, x, y = replace(case, batch=batch).make(torch.device("cpu"))
            yield f"{case.label}, 3x{case.image}x{case.image}", model, x, y


@contextmanager
def audits_timed() -> Iterator[list[float]]:
    """The seconds of each audit that is made inside."""
    found: list[float] = []
    audit, judge = Auditor.__call__, Auditor._judge
    judged = [0]

    def counted(self: Auditor, *args: Any, **rest: Any) -> Any:
        judged[0] += 1
        return judge(self, *args, **rest)

    def timed(self: Auditor, *args: Any) -> Any:
        before, start = judged[0], time.perf_counter()
        pulled = audit(self, *args)
        if judged[0] > before:
            found.append(time.perf_counter() - start)
        return pulled

    patched: Any = Auditor
    patched.__call__, patched._judge = timed, counted
    try:
        yield found
    finally:
        patched.__call__, patched._judge = audit, judge


def measure(
    model: nn.Module, x: Tensor, y: Tensor, *, dtype: torch.dtype, repeats: int, steps: int = STEPS
) -> dict[str, Any]:
    """Attacks of so many steps, each with one audit, which comes with the first; a plain one between two of them."""
    with warnings.catch_warnings(record=True) as caught, audits_timed() as audits:
        warnings.simplefilter("always", FastAttackWarning)
        fast = FastAttackModel(model, dtype=dtype)
        attack = torchattacks.PGD(fast, eps=EPS, alpha=EPS / 4, steps=steps)
        plain = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=PLAIN)
        attacks, plain_steps = [], []
        for _ in range(repeats + 1):
            plain_steps.append(seconds_of(lambda: plain(x, y)) / PLAIN)
            for kind in fast._networks.kinds.values():
                kind.schedule.passes = None
            attacks.append(seconds_of(lambda: attack(x, y)))
        ran_in = sorted({str(kind.dtype).removeprefix("torch.") for kind in fast._networks.kinds.values()})
    audit, whole = statistics.median(audits[1:]), statistics.median(attacks[1:])
    step, plain_step = (whole - audit) / steps, statistics.median(plain_steps[1:])
    return {
        "step": step,
        "plain step": plain_step,
        "audit": audit,
        "of one step": audit / step,
        "of a plain step": audit / plain_step,
        "of the attack": audit / (audit + STEPS * step),
        "ran in": ran_in,
        "warnings": [str(w.message) for w in caught if isinstance(w.message, FastAttackWarning)],
    }


def seconds_of(run: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def audits_in(passes: int) -> int:
    """How many of the first passes of a kind are audited, if nothing brings an audit forward."""
    return 1 + max(0, passes - 1 - SOON + PASSES) // PASSES


def table_of(rows: dict[str, dict[str, Any]], batch: int) -> Table:
    """Costs, and what each ran in."""
    body = [
        [
            name,
            f"{row['of one step']:.2f}",
            f"{row['of a plain step']:.2f}",
            f"{row['of the attack']:.2%}",
            f"{row['of one step'] * audits_in(IN_A_ROW * STEPS) / (IN_A_ROW * STEPS):.2%}",
            f"{row['of one step'] / PASSES:.2%}",
            f"{row['of one step'] / (PASSES // 2):.2%}",
            ", ".join(row["ran in"]),
            str(len(row["warnings"])),
        ]
        for name, row in rows.items()
    ]
    columns = [
        "network",
        "audit, in steps",
        "audit, in plain steps",
        f"share of a PGD-{STEPS} with one",
        f"share of {IN_A_ROW} in a row",
        "share of later attacks",
        "share in training",
        "ran in",
        "warnings",
    ]
    return Table(
        f"What an audit costs, batch {batch}",
        columns,
        body,
        f"Each entry is a median over attacks by torchattacks' PGD. The first step of each attack is audited. An "
        f"earlier attack, which is not timed, has made the networks and the self-check. In plain steps: beside a step "
        f"of the same attack on the plain model, which tells more where half precision is only emulated. The other "
        f"shares are computed: in {IN_A_ROW} attacks on as many batches {audits_in(IN_A_ROW * STEPS)} passes are "
        f"audited, in later attacks one in {PASSES}, and in training, where weights change "
        f"all the time, one in {PASSES // 2}. Ran in, warnings: the dtype after the audits, how many warnings came.",
    )


def main(
    batch: Annotated[int, typer.Option(help="Images in a pass.")] = 32,
    repeats: Annotated[int, typer.Option(help="Audits that are timed.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of the digits network.")] = 20,
    steps: Annotated[int, typer.Option(help="Steps of the attacks that are timed.")] = STEPS,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    only: Annotated[str, typer.Option(help="A part of the names of the networks to run.")] = "",
    tiny: Annotated[bool, typer.Option(help="The networks at the sizes of a test.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Time audits, and say what each network runs in after them."""
    rows: dict[str, dict[str, Any]] = {}
    settings = {"batch": batch, "repeats": repeats, "epochs": epochs, "steps": steps, "dtype": dtype}
    command = "python -m benchmarks.speed.audits"
    report = Report("audits", "The cost of audits", command, settings, torch.device("cpu"), out, console)
    for name, model, x, y in subjects(batch, epochs, only, tiny=tiny):
        with console.status(name):
            rows[name] = measure(model, x, y, dtype=getattr(torch, dtype), repeats=repeats, steps=steps)
        report.add("audits", Part([table_of(rows, batch)], rows), show=False)
    report.finish()
    table_of(rows, batch).show(console)


if __name__ == "__main__":
    typer.run(main)
