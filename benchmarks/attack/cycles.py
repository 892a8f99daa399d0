"""`python -m benchmarks.attack.cycles`: what does SafePGD save by stopping in cycles, and is the result the same?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.attack.kept import CACHE
from benchmarks.attack.networks import Subject, subject
from benchmarks.shared.report import OUT, Part, Report, Table
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.attack import LossName
from fastadv_adapters.attack.looking import Settings

SHARES = (4, 10)
"""A step is eps divided by one of these."""
LOSSES: tuple[LossName, ...] = ("ce", "margin", "dlr", "auto")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEW = {"images": 24, "steps": 60}
"""At most so much in float16, which is slow on processors."""

COLUMNS = ("dtype", "eps", "loss", "alpha", "images x steps", "robust", "early stop alone", "with cycles")
MORE = ("fewer", "verdicts", "images")
NOTE = (
    "The robust digits network, attacked by SafePGD in L-infinity. Robust: how many images stand. The next two "
    "columns: gradients at single images, with early stop alone, and if samples in a "
    "[cycle](../how-it-works.md#cycles) rest too. Verdicts: the number of images with the same verdict in both runs. "
    "Images: the number of those whose result is bit for bit the same. The steps that lead into a cycle cannot be "
    "saved; shorter steps need more of them. The direction of the loss auto changes with the step, so no sample may "
    "rest. In float16, which is slow on processors, there are fewer images and steps."
)
console = Console()


class EarlyStopAlone(SafePGD):
    """Goes on in cycles."""

    def _settings(self, *, classes: bool) -> Settings:
        return replace(super()._settings(classes=classes), stops_cycles=False)


@dataclass(frozen=True)
class Cell:
    """One attack: a row of the table."""

    dtype: str
    eps: float
    loss: LossName
    share: int
    images: int
    steps: int


def cells(dtypes: list[str], budgets: list[float], images: int, steps: int) -> Iterator[Cell]:
    """All rows; in float16 few."""
    for dtype in dtypes:
        short = dtype == "float16"
        count, length = (min(images, FEW["images"]), min(steps, FEW["steps"])) if short else (images, steps)
        for eps in budgets[:1] if short else budgets:
            for loss in LOSSES[:2] if short else LOSSES:
                for share in SHARES:
                    yield Cell(dtype, eps, loss, share, count, length)


def measure(target: Subject, cell: Cell) -> dict[str, Any]:
    """Both ways from the same starts, each with a fast model of its own."""
    x, y = target.images[: cell.images], target.labels[: cell.images]
    found: list[Tensor] = []
    record: dict[str, Any] = asdict(cell)
    for name, kind in (("early_stop_alone", EarlyStopAlone), ("with_cycles", SafePGD)):
        fast = FastAttackModel(target.net, dtype=DTYPES[cell.dtype])
        settings: dict[str, Any] = {"eps": cell.eps, "alpha": cell.eps / cell.share, "steps": cell.steps}
        generator = torch.Generator().manual_seed(0)
        attack = kind(fast, **settings, loss=cell.loss, early_stop=True, generator=generator)
        found.append(attack(x, y))
        record[name] = fast.gradient_stats.samples
    with torch.no_grad():
        robust = [target.net(images).argmax(1) == y for images in found]
    record["robust"] = int(robust[1].sum())
    record["same_verdicts"] = int((robust[0] == robust[1]).sum())
    record["same_images"] = int((found[0] == found[1]).flatten(1).all(1).sum())
    return record


def row_of(record: dict[str, Any]) -> list[str]:
    """A row of the table."""
    alone, ours = record["early_stop_alone"], record["with_cycles"]
    return [
        *(record["dtype"], f"{record['eps']:g}", record["loss"], f"eps/{record['share']}"),
        *(f"{record['images']} x {record['steps']}", str(record["robust"])),
        *(f"{alone:,}", f"{ours:,}", f"{alone / ours:.1f}x"),
        *(str(record["same_verdicts"]), str(record["same_images"])),
    ]


def main(
    budgets: Annotated[str, typer.Option(help="Budgets, with commas between.")] = "0.1,0.15",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = ",".join(DTYPES),
    images: Annotated[int, typer.Option(help="Test images.")] = 300,
    steps: Annotated[int, typer.Option(help="Steps.")] = 200,
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder for the network.")] = CACHE,
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Attack the robust digits network in L-infinity with steps of one size, with and without stopping in cycles."""
    torch.set_num_threads(threads)
    names = [name.strip() for name in dtypes.split(",")]
    if unknown := [name for name in names if name not in DTYPES]:
        raise typer.BadParameter(f"expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    settings = {"budgets": budgets, "images": images, "steps": steps}
    title, command = "Samples that rest in cycles", "python -m benchmarks.attack.cycles"
    report = Report("cycles", title, command, settings, torch.device("cpu"), out, console)
    target = subject("robust", cache, images=images)
    plan = list(cells(names, [float(eps) for eps in budgets.split(",")], images, steps))
    records = [measure(target, cell) for cell in track(plan, "attacks", console=console)]
    table = Table("Gradients that an attack needs", (*COLUMNS, *MORE), [row_of(record) for record in records], NOTE)
    report.add("cycles", Part([table], records))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
