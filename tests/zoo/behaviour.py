"""Control flow, gradient modes, flags, unusual inputs and outputs, samples that see each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.registry import CLASSES, IMAGE, Headed, classifier, register


def pair(inputs: int = 3, outputs: int = 6) -> nn.Sequential:
    """A convolution, its norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


@register()
class NoGradBlock(Headed):
    """A gate that no gradient passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = pair()
        self.body = pair()

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(x))
        return self.classify(gate * self.body(x) + self.gate(x).detach())


@register()
class DataDependent(Headed):
    """Chooses its branch, and how often it runs, by the values it sees; cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = pair()
        self.bright = pair()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.bright(x) if x.mean() > 0.25 else self.dark(x)
        for _ in range(int(x.max() * 2) + 1):
            y = torch.tanh(self.norm(self.conv(y)))
        return self.classify(y)


def _warm_up(model: nn.Module) -> None:
    assert isinstance(model, Temperature)
    model.temperature = 3.0


@register(change=_warm_up)
class Temperature(Headed):
    """A plain number that scales the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()
        self.temperature: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.classify(self.body(x)) * self.temperature


def _skip_norm(model: nn.Module) -> None:
    assert isinstance(model, OptionalNorm)
    model.normalised = False


@register(change=_skip_norm)
class OptionalNorm(Headed):
    """A flag that takes the norm out: the fold has to be undone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.normalised: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.conv(x)
        return self.classify(torch.relu(self.norm(y) if self.normalised else y))


def _add_norm(model: nn.Module) -> None:
    assert isinstance(model, OptionalReader)
    model.read_twice = True


@register(change=_add_norm)
class OptionalReader(Headed):
    """A flag that lets a second reader at what the convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.read_twice: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.conv(x)
        out = torch.relu(self.norm(y))
        return self.classify(out + torch.sigmoid(y) if self.read_twice else out)


def _replace_norm(model: nn.Module) -> None:
    assert isinstance(model, nn.Sequential)
    model[1] = nn.Identity()


@register(change=_replace_norm)
def replaced_layer() -> nn.Module:
    """The norm is replaced after wrapping."""
    return classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), channels=6)


def _change_options(model: nn.Module) -> None:
    assert isinstance(model, nn.Sequential)
    conv, norm = model[0], model[1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    conv.stride, norm.eps = (2, 2), 0.3


@register(change=_change_options)
def changed_options() -> nn.Module:
    """Stride and eps are changed after wrapping."""
    return classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register((4, 3, 8, 8), (4, 7))
class TwoInputs(Headed):
    """Images and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()
        self.side = nn.Linear(7, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        """Images (N, 3, H, W) and vectors (N, 7) to logits."""
        return self.classify(self.body(x) * torch.tanh(self.norm(self.side(side)))[:, :, None, None])


@register()
class TupleOutput(Headed):
    """Logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images to logits and features (N, 6, H, W)."""
        features: Tensor = self.body(x)
        return self.classify(features), features


@register()
class DictOutput(Headed):
    """Logits in a dictionary, beside something that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images to logits and the class they give."""
        logits = self.classify(self.body(x))
        return {"logits": logits, "classes": logits.detach().argmax(1)}


@register()
class Checkpointed(Headed):
    """Runs its body again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = pair()
        self.second = pair(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.classify(checkpoint(self.second, self.first(x), use_reentrant=False))


@register()
class KeepsActivations(Headed):
    """Stores what it saw last, which plain copying refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        self.seen = self.body(x)
        return self.classify(self.seen)


@register()
class Counting(Headed):
    """Counts its forward passes, in a number and in a buffer."""

    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()
        self.calls = 0
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        self.calls += 1
        self.passes += 1
        return self.classify(self.body(x))


@register()
class KeywordCalls(Headed):
    """Calls its layers with keywords, and with more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm1 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 6, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = torch.tanh(self.norm1(input=self.conv(input=x)))
        return self.classify(torch.relu(self.norm2(self.up(y, output_size=[14, 14]))))


@register(folds=False, coupled=True, warns=True)
class TrainsItsNorm(Headed):
    """Uses the statistics of the batch in eval mode too, by switching the norm's mode in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        self.norm.train()
        return self.classify(F.relu(self.norm(self.conv(x))))


@register(folds=False, coupled=True)
def norm_without_statistics() -> nn.Module:
    """Batch norm that uses the batch's own statistics in eval mode too."""
    return classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), channels=6)


@register(coupled=True)
class CentredOverBatch(Headed):
    """Subtracts the mean over the batch from its features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = pair()

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = self.body(x)
        return self.classify(torch.tanh(y - y.mean(0, keepdim=True)))


@register(IMAGE)
class Functional(nn.Module):
    """Functional layers on parameters of its own, in front of a norm that is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Parameter(torch.randn(CLASSES, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        y = F.relu(self.norm(F.conv2d(x, self.weight)))
        return F.linear(y.mean((2, 3)), self.head)
