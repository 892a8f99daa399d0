"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY", help="The model: a callable without arguments, or a module; MODULE may be a file."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Weights: safetensors, or a state_dict of torch.save.")]
Data = Annotated[
    str | None,
    typer.Option(
        help=".npz or .safetensors with x and y, a folder with a folder of images per class, or MODULE:DATASET."
    ),
]
Eps = Annotated[str, typer.Option(help="The budget, a number or a fraction.")]
Norm = Annotated[str, typer.Option(help="linf, l2 or l1.")]
Bounds = Annotated[str, typer.Option(help="Least and largest value of an image.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Limit = Annotated[int | None, typer.Option(min=1, help="How many samples to take, the first ones; all by default.")]
BatchSize = Annotated[int, typer.Option(min=1, help="How many samples are attacked at once.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture: PNG, PDF or SVG by its ending.")]
Triples = Annotated[Path | None, typer.Option(help="Draw clean images, perturbations and adversarials.")]
Require = Annotated[
    list[str] | None, typer.Option(help="End with status 1 if this falls short, as 'robust>=0.4'; may be repeated.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
