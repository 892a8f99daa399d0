"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="The model: a module or .py file, and the name of a model in it, or of what makes one without arguments.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="File of weights: safetensors, or a state_dict of torch.save.")]
Data = Annotated[
    str | None,
    typer.Option(
        help=".npz or .safetensors with x and y, a folder with a folder of images per class, or MODULE:DATASET."
    ),
]
Eps = Annotated[
    str, typer.Option(help="How far an attack may go, in units of the images and of the norm; a number or a fraction.")
]
Norm = Annotated[str, typer.Option(help="The norm of the budget: linf, l2 or l1.")]
Bounds = Annotated[str, typer.Option(help="Least and largest value of an image.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="The seed of all random numbers.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only so many samples, the first ones; all by default.")]
BatchSize = Annotated[int, typer.Option(min=1, help="How many samples are attacked at once.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture: PNG, PDF or SVG by its ending.")]
Triples = Annotated[
    Path | None,
    typer.Option(help="Draw clean images, perturbations and adversarial images: PNG, PDF or SVG by its ending."),
]
Require = Annotated[
    list[str] | None, typer.Option(help="End with status 1 if this falls short, as 'robust>=0.4'; may be repeated.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
