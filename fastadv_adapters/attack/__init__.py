"""``SafePGD``: an attack that no vanishing loss, half precision or broken gradient makes weaker.

``safe_pgd`` holds the settings, checked by ``checks``; ``search`` is the loop, over the samples that ``pool`` holds,
with ``objectives`` (another class, or just a higher loss) over ``targets``, made of ``losses`` and their
``directions``, ``steps`` of some size and ``balls`` to project onto; ``rounding`` keeps results inside them. Samples
whose iterates come again (``cycles``) rest until the next start (``resting``).

Public beside ``SafePGD``: losses, balls and step sizes, for attacks of one's own.
"""

from .balls import Ball, Norm, accept_norm, ball_around
from .checks import accept_bounds, accept_inputs, accept_logits, accept_size
from .losses import Loss, LossFunction, LossName, resolve_loss
from .safe_pgd import SafePGD
from .steps import step_sizes

__all__ = [
    "Ball",
    "Loss",
    "LossFunction",
    "LossName",
    "Norm",
    "SafePGD",
    "accept_bounds",
    "accept_inputs",
    "accept_logits",
    "accept_norm",
    "accept_size",
    "ball_around",
    "resolve_loss",
    "step_sizes",
]
