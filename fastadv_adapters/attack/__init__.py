"""``SafePGD``: an attack that no vanishing loss, half precision or spoilt gradient makes weaker.

``safe_pgd`` holds the settings, checked by ``checks``; ``search`` is the loop, over the samples that ``pool`` holds,
with ``objectives`` (another class, or just a higher loss) over ``targets``, made of ``losses`` and their
``directions``, ``steps`` of some size and ``balls`` to project onto (in L1 by ``shrinking``); ``rounding`` keeps
results inside them. Samples whose iterates come again (``cycles``) rest until the next start (``resting``). ``looking``
is shared by ``search`` and ``stream``, through which samples pass one by one (``flow``). ``doubts`` notes what is
allowed and seldom meant, and knows how sure a share of samples is.

Public beside ``SafePGD``: losses, balls and step sizes, for attacks of one's own.
"""

from .balls import Ball, Norm, accept_norm, ball_around
from .checks import accept_bounds, accept_classifier, accept_count, accept_inputs, accept_logits, accept_size
from .doubts import (
    LOADED,
    NONE_RIGHT,
    doubt_accuracy,
    doubt_budget,
    doubt_classes,
    doubt_images,
    doubt_logits,
    doubt_mode,
    doubt_steps,
    is_random,
    wilson,
)
from .flow import Departed, Entrants, Streaming
from .losses import Loss, LossFunction, LossName, asked_of, resolve_loss
from .objectives import undecided
from .safe_pgd import SafePGD
from .steps import LEAST_ROWS, step_sizes
from .stream import stream_of

__all__ = [
    "LEAST_ROWS",
    "LOADED",
    "NONE_RIGHT",
    "Ball",
    "Departed",
    "Entrants",
    "Loss",
    "LossFunction",
    "LossName",
    "Norm",
    "SafePGD",
    "Streaming",
    "accept_bounds",
    "accept_classifier",
    "accept_count",
    "accept_inputs",
    "accept_logits",
    "accept_norm",
    "accept_size",
    "asked_of",
    "ball_around",
    "doubt_accuracy",
    "doubt_budget",
    "doubt_classes",
    "doubt_images",
    "doubt_logits",
    "doubt_mode",
    "doubt_steps",
    "is_random",
    "resolve_loss",
    "step_sizes",
    "stream_of",
    "undecided",
    "wilson",
]
