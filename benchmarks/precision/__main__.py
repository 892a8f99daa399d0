"""How right half precision is: gradients that vanish, their direction, and the robust accuracy that comes of them.

Run with `python -m benchmarks.precision`; `--help` lists its options. Two networks
trained on handwritten digits until they are confident are attacked in several ways, once with their logits doubled;
every judgement is the plain float32 network's.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.precision.subjects import Multiplied, Settings, train_subjects
from benchmarks.precision.ways import ways
from benchmarks.shared.correctness import judge
from benchmarks.shared.report import OUT, Part, Report

WAYS = (
    "Every way is torchattacks' PGD. Plain: on the network itself. Fast: on a FastAttackModel. Recipe: batch norm "
    "folded, weights frozen, channels-last, autocast."
)
RESNET = "The ResNet-18 is trained on the digits in three channels."
console = Console()


def main(
    images: Annotated[int, typer.Option(help="Test images for the digits network, at most 360.")] = 200,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of the digits network.")] = 20,
    resnet_images: Annotated[int, typer.Option(help="Test images for the ResNet-18; 0 leaves it out.")] = 100,
    resnet_epochs: Annotated[int, typer.Option(help="Epochs of the ResNet-18.")] = 12,
    resnet_width: Annotated[int, typer.Option(help="Channels of its first stage.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights, batches and attacks.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and Markdown.")] = OUT,
) -> None:
    """Compare gradients and robust accuracy of half-precision attacks with the plain network's."""
    settings = Settings(images, steps, epochs, resnet_images, resnet_epochs, resnet_width, seed)
    place = torch.device(device)
    title, command = "Right gradients in half precision", "python -m benchmarks.precision"
    report = Report("precision", title, command, asdict(settings), place, out, console)
    for subject in train_subjects(settings, place):
        for factor in (1, 2):
            name = f"{subject.name}, logits x {factor}"
            model = subject.model if factor == 1 else Multiplied(subject.model, factor).eval()
            with console.status(name):
                judgement = judge(ways(), subject, steps=steps, seed=seed, model=model)
            table = judgement.table(name)
            note = f"{table.note} {RESNET}" if subject.name == "ResNet-18" else table.note
            told = replace(table, note=note, legend=f"{table.legend} {WAYS}")
            report.add(name, Part([told], judgement.record()))
    report.finish()


if __name__ == "__main__":
    typer.run(main)
