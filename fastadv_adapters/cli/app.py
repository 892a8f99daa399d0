"""The commands."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from ..attack import LOADED, accept_norm
from ..comparison import Comparison, compare, expect_picture, expect_writable, write_json
from ..evaluation import Report, evaluate
from ..modules import parameters_of
from . import arguments as given
from .data import data_named, first_of
from .demo import EPS, trained
from .failing import FALLS_SHORT, OneLine, in_one_line
from .info import information
from .models import device_named, model_named
from .numbers import bounds as bounds_of
from .numbers import number, numbers, requirement, shape
from .speaking import is_first, record

app = typer.Typer(
    help="Fast adversarial attacks in PyTorch that stay as strong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=OneLine,
)
DEFAULT_EPS = "8/255"


@app.command("info")
def show_information(json_file: given.Json = None, debug: given.Debug = False) -> None:
    """Devices, versions, extras, and what "auto" chooses."""
    with in_one_line(debug=debug):
        _can_be_written(json_file)
        found = information()
        console = Console(highlight=False)
        for head, told in found.items():
            console.print(f"{head}:", markup=False)
            for name, value in told.items():
                text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
                console.print(f"  {name}: {text}", markup=False, soft_wrap=True)
        if json_file is not None:
            write_json(json_file, found)


@app.command("compare")
def compare_command(
    model: given.Model,
    weights: given.Weights = None,
    shaped: Annotated[
        str | None, typer.Option("--input", help="Attack random images of this shape, such as 3x32x32.")
    ] = None,
    data: given.Data = None,
    eps: given.Eps = DEFAULT_EPS,
    norm: given.Norm = "linf",
    bounds: given.Bounds = "0,1",
    batch_size: given.BatchSize = 64,
    limit: given.Limit = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    device: given.Device = "auto",
    seed: given.Seed = 0,
    json_file: given.Json = None,
    plot: given.Plot = None,
    debug: given.Debug = False,
) -> None:
    """Is a fast model faster than yours, and are attacks on it as strong?

    One batch is attacked by PGD with ten steps, plain and fast in turn. Status 1 if the fast model is not faithful.
    """
    with in_one_line(debug=debug):
        _can_be_written(json_file, plot)
        torch.manual_seed(seed)
        budget, within = number(eps), bounds_of(bounds)
        place = device_named(device)
        net = model_named(model, weights, place)
        count = min(batch_size, limit or batch_size)
        x, y = _batch(net, shaped, data, count, within)
        found = compare(
            net,
            x.to(place),
            None if y is None else y.to(place),
            eps=budget,
            norm=accept_norm(norm),
            bounds=within,
            repeats=repeats,
        )
        found.print()
        if weights is None:
            _ask_for_weights(found.notes)
        _write(found, json_file, plot)
        if not found.faithful:
            sys.exit(FALLS_SHORT)


@app.command("evaluate")
def evaluate_command(
    model: given.Model,
    weights: given.Weights = None,
    data: given.Data = None,
    attacks: Annotated[
        str, typer.Option(help="quick, strong, standard (AutoAttack; needs an extra), or names of attacks with commas.")
    ] = "standard",
    eps: Annotated[
        str, typer.Option(help="How far an attack may go: a number or a fraction; several with commas give a curve.")
    ] = DEFAULT_EPS,
    norm: given.Norm = "linf",
    bounds: given.Bounds = "0,1",
    batch_size: given.BatchSize = 128,
    limit: given.Limit = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep all that is found in this folder; the same command goes on from there.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what is in the folder.")] = True,
    progress: Annotated[bool, typer.Option(help="Show how far it is.")] = True,
    require: given.Require = None,
    device: given.Device = "auto",
    seed: given.Seed = 0,
    json_file: given.Json = None,
    plot: given.Plot = None,
    triples: given.Triples = None,
    debug: given.Debug = False,
) -> None:
    """Robust accuracy on a data set.

    Under torchrun the samples are shared among its processes, which need --output.
    """
    kept = (
        f": what is finished is in {output}, the same command goes on" if output else ", nothing is kept (see --output)"
    )
    with in_one_line(debug=debug, after=kept):
        _can_be_written(json_file, plot, triples)
        required = [requirement(text) for text in require or ()]
        budgets, within = numbers(eps), bounds_of(bounds)
        torch.manual_seed(seed)  # what makes the model may draw
        net = model_named(model, weights, device_named(device))
        if data is None:
            raise ValueError("expected data to evaluate on, got none: give --data")
        report = evaluate(
            net,
            data_named(data, _dtype(net), within),
            [name.strip() for name in attacks.split(",")],
            eps=budgets,
            norm=accept_norm(norm),
            bounds=within,
            batch_size=batch_size,
            output=output,
            resume=resume,
            progress=progress,
            seed=seed,
            limit=limit,
        )
        _report(report, required, json_file, plot, triples, ask=weights is None)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="The folder that was given to evaluate as --output.")],
    require: given.Require = None,
    json_file: given.Json = None,
    plot: given.Plot = None,
    triples: given.Triples = None,
    debug: given.Debug = False,
) -> None:
    """Show what an evaluation has found so far."""
    with in_one_line(debug=debug):
        _can_be_written(json_file, plot, triples)
        required = [requirement(text) for text in require or ()]
        _report(Report.load(folder), required, json_file, plot, triples)


@app.command("demo")
def demo_command(
    device: given.Device = "auto",
    seed: given.Seed = 0,
    json_file: given.Json = None,
    plot: given.Plot = None,
    debug: given.Debug = False,
) -> None:
    """Compare and evaluate a small network.

    It is trained on the digits of scikit-learn first; all takes a minute, and nothing is downloaded.
    """
    with in_one_line(debug=debug):
        _can_be_written(json_file, plot)
        net, x, y = trained(seed, device_named(device))
        found = compare(net, x, y, eps=EPS)
        found.print()
        _write(found, json_file, plot)
        typer.echo(str(evaluate(net, (x, y), "quick", eps=EPS, seed=seed)))


def _batch(
    model: nn.Module, shaped: str | None, data: str | None, count: int, within: tuple[float, float]
) -> tuple[Tensor, Tensor | None]:
    """The batch to compare on."""
    if (shaped is None) == (data is None):
        raise ValueError(f"expected --input or --data, got {'both' if data else 'neither'}: give one of them")
    if data is not None:
        return first_of(data_named(data, _dtype(model), within), count)
    lower, upper = within
    x = torch.rand(count, *shape(str(shaped)), dtype=_dtype(model))
    return x * (upper - lower) + lower, None


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of images: that of the model's first floating parameter, float32 if there is none."""
    return next((p.dtype for p in parameters_of(model) if p.is_floating_point()), torch.float32)


def _report(
    report: Report,
    required: list[Any],
    json_file: Path | None,
    plot: Path | None,
    triples: Path | None,
    *,
    ask: bool = False,
) -> None:
    """Show a report and write what is to be written, in the first process alone; status 1 if it falls short."""
    if not is_first():  # which ends well: torchrun would end the first one in the middle of writing
        return
    typer.echo(str(report))
    if ask:
        _ask_for_weights(report.notes)
    _write(report, json_file, plot)
    if triples is not None:
        report.triples(triples)
        typer.echo(f"written: {triples}")
    short = [f"{one.text}, got {getattr(report, one.attribute):.4f}" for one in required if not one.holds(report)]
    if required and not report.complete:
        short.append("not all samples are finished")
    for text in short:
        typer.echo(f"falls short: {text}", err=True)
    if short:
        record(f"falls short: {'; '.join(short)}")
        sys.exit(FALLS_SHORT)


def _ask_for_weights(notes: Sequence[str]) -> None:
    """Name the option, which was not given, if a note doubts that weights were loaded."""
    if is_first() and any(LOADED in note for note in notes):
        typer.echo("note: the command was given no --weights")


def _can_be_written(json_file: Path | None, *pictures: Path | None) -> None:
    """Raise of a file that cannot be written before anything is computed; the first process alone writes."""
    for path in pictures:
        if path is not None:
            expect_picture(path)
    for path in (json_file, *pictures):
        if path is not None and is_first():
            expect_writable(path)


def _write(found: Comparison | Report, json_file: Path | None, plot: Path | None) -> None:
    for path, write in ((json_file, found.to_json), (plot, found.plot)):
        if path is not None:
            write(path)
            typer.echo(f"written: {path}")
