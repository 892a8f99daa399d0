"""What fast networks are made of, and follow, where that cannot be the wrapped model itself."""

from torch import nn

from ..modules import Precision, clone, copy_module, has_own_switch, thaw
from .freshness import Change, Freshness
from .twin import Twin


class Pattern:
    """A copy of a model in eval mode that follows it and never runs, so that nothing of a pass is in what it hands on.

    Args:
        source: what is followed.
        precision: says where it is.

    Attributes:
        network: the copy.
    """

    def __init__(self, source: nn.Module, precision: Precision) -> None:
        self._twin = Twin(source, precision, live=True)
        self.network = self._twin.engine.network
        self._seen = Freshness(self.network)

    def follow(self) -> bool:
        """Follow; whether ``eval()`` has left more than other values: a number, or new tensors in a list."""
        self._twin.follow()
        change = self._seen.change()
        self._seen.take(change)
        return change is Change.STRUCTURE


def pattern_of(source: nn.Module, twin: Twin, precision: Precision) -> Pattern | None:
    """One for a model that goes to eval mode in its own way, or of a twin without live following; None for others.

    What a model's own ``eval()`` computes is of all its norms, and of weights in its own dtypes, neither of which a
    fast network has.
    """
    if twin.live:
        return Pattern(source, precision) if has_own_switch(source) else None
    return Pattern(twin.engine.network, precision)  # which has the weights of the last update


def switched(source: nn.Module) -> nn.Module:
    """The model; or a copy in eval mode if it goes there in its own way."""
    if not has_own_switch(source):
        return source
    copied = copy_module(source, clone)
    thaw(copied, source)
    return copied
