"""Train a network on digits, normally and adversarially, and attack it with three libraries, plain and fast.

Run with `make demo`, or `python examples/demo.py --help` for its options.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from digits import Attack, Digits, DigitsNet, accuracy, grey_digits, predict, train
from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.comparison import describe_device
from fastadv_adapters.foolbox import FastPyTorchModel

try:
    import foolbox
    import torchattacks
    import typer
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    raise SystemExit(f"expected {error.name} to be installed, got none: pip install -e '.[demo]'") from None

EPS = 0.15
"""How far an attack may move a pixel, where 0 is white and 1 is black."""

console = Console()


class Sizes(NamedTuple):
    """How much work the demo does."""

    width: int = 32
    epochs: int = 20
    adversarial_epochs: int = 15
    images: int = 360
    steps: int = 10
    rounds: int = 5


QUICK = Sizes(width=8, epochs=1, adversarial_epochs=1, images=32, steps=2, rounds=1)


class Row(NamedTuple):
    """One line of the table: an attack on a network, on the plain and on the fast model.

    Attributes:
        training: how the network was trained.
        attack: the attack's name.
        seconds_plain: median time of the attack on the plain model.
        seconds_fast: likewise on the fast model.
        robust_plain: share of the images, 0 to 1, that the plain model gets right after the attack on itself.
        robust_fast: the same after the attack on the fast model, and still as the plain model sees it.
    """

    training: str
    attack: str
    seconds_plain: float
    seconds_fast: float
    robust_plain: float
    robust_fast: float

    def cells(self) -> list[str]:
        """The row as text, with the ratio of the times."""
        ratio = self.seconds_plain / self.seconds_fast
        seconds = [f"{self.seconds_plain:.2f}", f"{self.seconds_fast:.2f}", f"{ratio:.2f}"]
        return [self.training, self.attack, *seconds, f"{self.robust_plain:.1%}", f"{self.robust_fast:.1%}"]


HEADINGS = ("training", "attack", "seconds plain", "seconds fast", "ratio", "robust plain", "robust fast")


# --- the three attacks, as a user writes them: first on the plain model, then on the fast one ---


def torchattacks_pgd(model: nn.Module, fast: FastAttackModel, *, steps: int) -> tuple[Attack, Attack]:
    """`torchattacks.PGD`: the fast model stands where the plain one stood."""
    plain = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    faster = torchattacks.PGD(fast, eps=EPS, alpha=EPS / 4, steps=steps)
    return plain, faster


def foolbox_pgd(model: nn.Module, fast: FastAttackModel, *, steps: int) -> tuple[Attack, Attack]:
    """`LinfPGD` of foolbox: `FastPyTorchModel` stands where `foolbox.PyTorchModel` stood."""
    attack = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=1 / 4)
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device=fast.device)
    fast_fmodel = FastPyTorchModel(model, bounds=(0, 1), device=fast.device)

    def run_on(fmodel: foolbox.PyTorchModel) -> Attack:
        return lambda x, y: attack(fmodel, x, y, epsilons=EPS)[1]

    return run_on(fmodel), run_on(fast_fmodel)


def safe_pgd(model: nn.Module, fast: FastAttackModel, *, steps: int) -> tuple[Attack, Attack]:
    """The package's own `SafePGD`, which takes either."""
    return SafePGD(model, eps=EPS, alpha=EPS / 4, steps=steps), SafePGD(fast, eps=EPS, alpha=EPS / 4, steps=steps)


ATTACKS: dict[str, Callable[..., tuple[Attack, Attack]]] = {
    "torchattacks PGD": torchattacks_pgd,
    "foolbox LinfPGD": foolbox_pgd,
    "SafePGD": safe_pgd,
}


# --- training, measuring, showing ---


def train_both(data: Digits, sizes: Sizes, *, seed: int) -> dict[str, FastAttackModel]:
    """A network trained on what an attack made of the digits, and one trained on them as they are, both wrapped."""
    device = data.train_images.device
    torch.manual_seed(seed)
    normal, robust = (DigitsNet(width=sizes.width).to(device) for _ in range(2))
    train(normal, data.train_images, data.train_labels, epochs=sizes.epochs, seed=seed, title="normal training     ")

    fast = FastAttackModel(robust)  # follows `robust` through every step of the optimizer by itself
    attack = torchattacks.PGD(fast, eps=EPS, alpha=EPS / 2, steps=4)
    steps = train(
        robust,
        data.train_images,
        data.train_labels,
        attack=attack,
        epochs=sizes.adversarial_epochs,
        seed=seed,
        title="adversarial training",
    )
    predict(fast, data.test_images[:1])  # it follows the last step too
    console.print(f"The network changed {steps} times and nobody called update(). The fast model that attacked it:")
    facts = fast.summary().splitlines()
    console.print("\n".join(line for line in facts if line.split()[0] in ("device", "dtype", "updates")))
    return {"adversarial": fast, "normal": FastAttackModel(normal)}


def measure(training: str, fast: FastAttackModel, data: Digits, sizes: Sizes, *, progress: Progress) -> list[Row]:
    """Each attack on the test images, on the plain and on the fast model in turn; one run of each is not counted."""
    x, y = data.test_images, data.test_labels
    model = fast.wrapped
    rows = []
    for name, build in progress.track(ATTACKS.items(), description=f"attacks after {training} training"):
        attacks = build(model, fast, steps=sizes.steps)
        images = [_adversarial(attack, x, y) for attack in attacks]
        seconds = [[_seconds(attack, x, y) for attack in attacks] for _ in range(sizes.rounds)]
        plain, faster = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(Row(training, name, plain, faster, *(accuracy(model, adversarial, y) for adversarial in images)))
    return rows


def _adversarial(attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(0)  # the same random start for the plain and the fast model
    return attack(x, y)


def _seconds(attack: Attack, x: Tensor, y: Tensor) -> float:
    start = time.perf_counter()
    attack(x, y).sum().item()  # .item() waits for an accelerator
    return time.perf_counter() - start


def show_table(rows: list[Row], caption: str) -> None:
    """Print the rows as a table."""
    table = Table(title=caption, box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading.replace(" ", "\n"), justify="left" if heading in HEADINGS[:2] else "right")
    for row in rows:
        table.add_row(*row.cells(), end_section=row.attack == list(ATTACKS)[-1])
    console.print(table)


def markdown(rows: list[Row], caption: str) -> str:
    """The rows as a Markdown table with a caption below."""
    lines = [HEADINGS, ("---", "---", *["---:"] * 5), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def draw(path: Path, models: Mapping[str, FastAttackModel], data: Digits, *, steps: int) -> None:
    """Write a picture: one digit of each class, clean and as attacked on each network, with what is seen in them."""
    y = torch.arange(10, device=data.test_labels.device)
    x = data.test_images[[int((data.test_labels == digit).nonzero()[0]) for digit in range(10)]]
    panels = []
    for name, fast in models.items():
        adversarial = SafePGD(fast, eps=EPS, steps=steps)(x, y)
        panels.append((f"{name}\ntraining,\nclean", x, predict(fast, x)))
        panels.append((f"{name}\ntraining,\nattacked", adversarial, predict(fast, adversarial)))
    figure = Figure(figsize=(11, 1.3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 10, squeeze=False)
    for axes, (title, images, predictions) in zip(grid, panels, strict=True):
        axes[0].text(-0.25, 0.5, title, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)
        for cell, image, label, seen in zip(axes, images.cpu().numpy(), y.tolist(), predictions.tolist(), strict=True):
            cell.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            cell.set_axis_off()
            right = seen == label  # a cross tells without colours
            cell.set_title(str(seen) if right else f"{seen} \N{BALLOT X}", color="#0072b2" if right else "#d55e00")
    figure.savefig(path, dpi=120)


def keep(folder: Path, models: Mapping[str, FastAttackModel], data: Digits) -> None:
    """Write the networks' weights and the test digits, for the command `fastadv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, fast in models.items():
        save_file(fast.wrapped.state_dict(), folder / f"{name}.safetensors")
    save_file({"x": data.test_images, "y": data.test_labels}, folder / "digits.safetensors")


def main(
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    table: Annotated[Path, typer.Option(help="Where the table goes, as Markdown.")] = Path("demo.md"),
    kept: Annotated[Path, typer.Option(help="Folder for weights and digits.")] = Path("build/demo"),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the networks and the order of the images.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that it runs, and nothing else.")] = False,
) -> None:
    """Train a network on digits, normally and adversarially, and attack it with three libraries, plain and fast."""
    sizes = QUICK if quick else Sizes()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = Digits(*(tensor.to(device) for tensor in grey_digits(test_size=sizes.images, seed=seed)))
    models = train_both(data, sizes, seed=seed)
    with Progress(console=console) as progress:
        rows = [row for name, fast in models.items() for row in measure(name, fast, data, sizes, progress=progress)]
    where = describe_device(torch.device(device))
    caption = (
        f"{sizes.images} digits, eps {EPS}, {sizes.steps} steps; "
        f"medians of {sizes.rounds} runs in turn, warm-up apart;\n"
        f"{device} ({where['name']}, {where['capability']}), {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}, fast model in {str(models['normal'].dtype).removeprefix('torch.')}."
    )
    show_table(rows, caption)
    table.write_text(markdown(rows, caption), encoding="utf-8")
    draw(picture, models, data, steps=sizes.steps)
    keep(kept, models, data)
    console.print(f"Table: {table}   Picture: {picture}   Networks and digits: {kept}")


if __name__ == "__main__":
    typer.run(main)
