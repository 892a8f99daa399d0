"""Random small networks, inputs and losses for property tests."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo.registry import give_statistics

Draw = Callable[[st.SearchStrategy[Any]], Any]
Family = Literal["vectors", "tokens", "1d", "2d", "3d"]

_DIMENSIONS: dict[str, int] = {"1d": 1, "2d": 2, "3d": 3}
_SIZES = {"1d": (3, 8), "2d": (3, 6), "3d": (2, 3)}
_LAYERS = {
    ("conv", 1): nn.Conv1d,
    ("conv", 2): nn.Conv2d,
    ("conv", 3): nn.Conv3d,
    ("transposed", 1): nn.ConvTranspose1d,
    ("transposed", 2): nn.ConvTranspose2d,
    ("transposed", 3): nn.ConvTranspose3d,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Of few entries, or with a tiny eps, a norm over one sample leaves hardly anything of a gradient but rounding.
_FEWEST, _EPS = 4, 0.1
_MAXIMUM = (nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.Identity, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

SMOOTH: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = SMOOTH | {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
}
BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
}


@dataclass(frozen=True)
class StageRecipe:
    """One layer with what may stand around it.

    Attributes:
        layer: arguments of the layer, all but its class.
        transposed: whether a convolution is a transposed one.
        norm: the norm, if any.
        normed: shape of what the norm gets of one sample.
        first: whether norm and activation come before the layer (pre-activation).
        between: what stands between layer and norm.
        activation: a key of `ACTIVATIONS`.
        shortcut: what is added at the end: the input, the input through a layer and a norm of its own, or what the
            layer gave, before the norm.
        pool: pooling at the end.
        calls: how often the whole stage is run, each time on what it gave before.
    """

    layer: dict[str, Any]
    transposed: bool = False
    norm: Literal["none", "batch", "batch without affine", "group", "layer"] = "batch"
    normed: tuple[int, ...] = ()
    first: bool = False
    between: tuple[str, ...] = ()
    activation: str = "none"
    shortcut: Literal["none", "input", "projection", "layer"] = "none"
    pool: Literal["none", "max", "average"] = "none"
    calls: int = 1

    @property
    def must_fold(self) -> bool:
        """Whether the norm has to be folded into the layer: nobody else reads what the layer gives."""
        return self.norm.startswith("batch") and not self.first and self.shortcut != "layer"


@dataclass(frozen=True)
class Recipe:
    """A whole network, with the seed of its weights.

    Attributes:
        family: what one sample is: a vector, tokens (T, F), or channels over one to three dimensions.
        shape: of one sample.
        stages: in order.
        hidden: whether a linear layer with a norm stands before the last layer.
        head: how space is left behind.
        classes: number of logits.
        seed: of weights and statistics.
        spread: running variances are multiplied by powers of ten up to this, and divided by as much.
    """

    family: Family
    shape: tuple[int, ...]
    stages: tuple[StageRecipe, ...]
    hidden: bool
    head: Literal["mean", "max", "flatten"]
    classes: int
    seed: int
    spread: int

    def build(self) -> "Net":
        """The network in eval mode and float32, the same one at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = Net(self)
            give_statistics(net)
            _spread_variances(net, self.spread)
        net.eval()
        return net

    def inputs(self, samples: int) -> Tensor:
        """Inputs (samples, ...) with values around 0, in float64; the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(samples, *self.shape, generator=generator, dtype=torch.float64)


class Stage(nn.Module):
    """One layer with what stands around it; see `StageRecipe`. What the recipe leaves out is None."""

    def __init__(self, recipe: StageRecipe, family: Family, tokens: int) -> None:
        super().__init__()
        self.first, self.added, self.calls = recipe.first, recipe.shortcut, recipe.calls
        dimensions = _DIMENSIONS.get(family, 0)
        self.layer = _layer(recipe, dimensions)
        self.norm = _norm(recipe, dimensions)
        self.between = nn.Sequential(*(BETWEEN[name]() for name in recipe.between)) if recipe.between else None
        self.activation = ACTIVATIONS[recipe.activation]() if recipe.activation != "none" else None
        self.projection: nn.Module | None = None
        if recipe.shortcut == "projection":
            channels = tokens or _channels(recipe.layer)[1]
            self.projection = nn.Sequential(_layer(recipe, dimensions), _NORMS[dimensions](channels))
        pools = {"none": None, "max": _MAXIMUM[dimensions], "average": _AVERAGE[dimensions]}
        pool = pools[recipe.pool]
        self.pool = pool(2) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage as often as the recipe says."""
        for _ in range(self.calls):
            x = self._once(x)
        return x

    def _once(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(self._normed(x) if self.first else x)
        y = h if self.between is None else self.between(h)
        y = y if self.first else self._normed(y)
        if self.added == "input":
            y = y + x
        if self.projection is not None:
            y = y + self.projection(x)
        if self.added == "layer":
            y = y + h
        return y if self.pool is None else self.pool(y)

    def _normed(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class Net(nn.Module):
    """Stages, then a head; see `Recipe`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.head = "flatten" if recipe.family == "vectors" else recipe.head
        tokens = recipe.shape[0] if recipe.family == "tokens" else 0
        self.stages = nn.Sequential(*(Stage(stage, recipe.family, tokens) for stage in recipe.stages))
        with torch.no_grad():
            features = self._flat(self.stages.eval()(torch.zeros(1, *recipe.shape))).shape[1]
        self.hidden = nn.Sequential(nn.Linear(features, 6), nn.BatchNorm1d(6), nn.SiLU()) if recipe.hidden else None
        features = 6 if recipe.hidden else features
        self.last = nn.Linear(features, recipe.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to logits (N, classes)."""
        x = self._flat(self.stages(x))
        logits: Tensor = self.last(x if self.hidden is None else self.hidden(x))
        return logits

    def _flat(self, x: Tensor) -> Tensor:
        if self.head == "flatten":
            return x.flatten(1)
        return x.flatten(2).mean(2) if self.head == "mean" else x.flatten(2).amax(2)


def _layer(recipe: StageRecipe, dimensions: int) -> nn.Module:
    kind = "transposed" if recipe.transposed else "conv"
    return _LAYERS[kind, dimensions](**recipe.layer) if dimensions else nn.Linear(**recipe.layer)


def _norm(recipe: StageRecipe, dimensions: int) -> nn.Module | None:
    channels = recipe.normed[0]
    if recipe.norm == "group":
        return nn.GroupNorm(_groups(recipe.normed), channels, eps=_EPS)
    if recipe.norm == "layer":
        return nn.LayerNorm(recipe.normed if dimensions else recipe.normed[-1:], eps=_EPS)
    return None if recipe.norm == "none" else _NORMS[dimensions](channels, affine=recipe.norm == "batch")


def _groups(normed: tuple[int, ...]) -> int:
    """How many groups a group norm makes: two, unless that leaves too few entries in each."""
    return 2 if normed[0] % 2 == 0 and math.prod(normed) >= 2 * _FEWEST else 1


def _channels(layer: dict[str, Any]) -> tuple[int, int]:
    """How many go in and come out."""
    inputs, outputs = (value for key, value in layer.items() if key.endswith(("_channels", "_features")))
    return inputs, outputs


@torch.no_grad()
def _spread_variances(net: nn.Module, spread: int) -> None:
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_var is not None:
            part.running_var.mul_(10.0 ** torch.empty_like(part.running_var).uniform_(-spread, spread))


@st.composite
def recipes(draw: Draw, *, smooth: bool = False, most: int = 3) -> Recipe:
    """Networks of up to ``most`` stages; ``smooth`` ones have no kinks, so that rounding cannot flip anything."""
    family: Family = draw(st.sampled_from(["vectors", "tokens", "1d", "2d", "2d", "2d", "3d"]))
    channels = draw(st.integers(1, 4))
    sizes = tuple(draw(st.integers(*_SIZES[family])) for _ in range(_DIMENSIONS.get(family, 0)))
    tokens = (draw(st.integers(2, 5)),) if family == "tokens" else ()
    shape = (*tokens, channels, *sizes)
    stages = []
    for _ in range(draw(st.integers(1, most))):
        stage, channels, sizes = draw(_stages(family, tokens, channels, sizes, smooth))
        stages.append(stage)
    return Recipe(
        family,
        shape,
        tuple(stages),
        hidden=draw(st.booleans()),
        head=draw(st.sampled_from(["mean", "flatten"] if smooth else ["mean", "flatten", "max"])),
        classes=draw(st.integers(2, 5)),
        seed=draw(st.integers(0, 2**16)),
        spread=draw(st.integers(0, 2)),
    )


Sizes = tuple[int, ...]


@st.composite
def _stages(
    draw: Draw, family: Family, tokens: Sizes, channels: int, sizes: Sizes, smooth: bool
) -> tuple[StageRecipe, int, Sizes]:
    """One stage, and how many channels of which sizes come out of it."""
    transposed, after = False, sizes
    if sizes:
        layer, transposed, after = draw(_convolutions(channels, sizes, large=6 if family == "3d" else 12))
    else:
        layer = {"in_features": channels, "out_features": draw(st.integers(1, 6))}
    layer["bias"] = draw(st.booleans())
    outputs = _channels(layer)[1]
    first = draw(st.booleans())
    normed = (*tokens, channels, *sizes) if first else (*tokens, outputs, *after)
    norm = draw(
        st.sampled_from(["batch", "batch", "batch", "batch without affine", "none", *_sample_norms(normed, tokens)])
    )
    activations = [name for name in (SMOOTH if smooth else ACTIVATIONS) if norm != "none" or "in place" not in name]
    unchanged = (outputs, after) == (channels, sizes)
    shortcuts = ["none", "none", "projection", "layer"] + ["input", "input"] * unchanged
    pools = ["none", "average"] + ["max"] * (not smooth) if min(after, default=0) >= 2 else ["none"]
    recipe = StageRecipe(
        layer,
        transposed,
        norm,
        normed,
        first=first,
        between=tuple(draw(st.lists(st.sampled_from(list(BETWEEN)), max_size=2))),
        activation=draw(st.sampled_from(activations)),
        shortcut=draw(st.sampled_from(shortcuts)),
        pool=draw(st.sampled_from(pools)),
        calls=1,
    )
    if unchanged and recipe.pool == "none" and draw(st.booleans()):
        recipe = StageRecipe(**{**vars(recipe), "calls": 2})
    return recipe, outputs, after if recipe.pool == "none" else tuple(size // 2 for size in after)


def _sample_norms(normed: Sizes, tokens: Sizes) -> list[str]:
    """Norms over one sample, or over one token of it, that have enough entries of this shape to work on."""
    enough = {"group": math.prod(normed), "layer": normed[-1] if tokens else math.prod(normed)}
    return [name for name, entries in enough.items() if entries >= _FEWEST]


@st.composite
def _convolutions(draw: Draw, channels: int, sizes: Sizes, large: int) -> tuple[dict[str, Any], bool, Sizes]:
    """Arguments of a convolution, whether it is a transposed one, and the sizes of what it gives."""
    outputs, stride = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
    dilation = tuple(
        draw(st.integers(1, 2 if 2 * (k - 1) < size else 1)) for k, size in zip(kernel, sizes, strict=True)
    )
    padding = tuple(draw(st.integers(0, d * (k // 2))) for d, k in zip(dilation, kernel, strict=True))
    layer = {
        "in_channels": channels,
        "out_channels": outputs,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": draw(st.sampled_from([g for g in (1, 2, 3, 4) if math.gcd(channels, outputs) % g == 0])),
    }
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    margins = [2 * p - r for p, r in zip(padding, reach, strict=True)]
    wide = tuple((size - 1) * stride - margin + 1 for size, margin in zip(sizes, margins, strict=True))
    if min(wide) >= 1 and max(wide) < large and draw(st.booleans()):
        extra = layer["output_padding"] = draw(st.integers(0, stride - 1))
        return layer, True, tuple(size + extra for size in wide)
    layer["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate", "reflect"]))
    # Zeros on one side more than on the other are a warning of PyTorch's.
    same = stride == 1 and (layer["padding_mode"] != "zeros" or not any(r % 2 for r in reach))
    layer["padding"] = draw(st.sampled_from([padding, padding, "valid"] + ["same"] * same))
    if layer["padding"] == "same":
        return layer, False, sizes
    if layer["padding"] == "valid":
        margins = [-r for r in reach]
    return layer, False, tuple((size + margin - 1) // stride + 1 for size, margin in zip(sizes, margins, strict=True))
