"""Layers that lay nothing out ahead, because the model writes into its weights when it is run, perhaps unseen."""

from torch import nn

from ..modules import modules_of
from .linear import Kept
from .prepacked import Prepacked


def lay_nothing_out(network: nn.Module) -> None:
    """Have all layers of a network run on their weights as they are."""
    for part in modules_of(network):
        for name in ("prepacked", "laid_out"):
            kept = vars(part).get(name)
            if isinstance(kept, (Prepacked, Kept)):
                kept.refuse()
