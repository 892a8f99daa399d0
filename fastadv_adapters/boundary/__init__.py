"""What happens to tensors on the way into a fast network and out of it.

A call is packed (``packing``, ``opening``) and run as one autograd Function (``function``) by whatever implements the
protocols in ``run``. On the way back ``crossing`` scales each sample's gradient, unscales it in float32 and filters it
(``scaling``, ``powers``). Inside the transforms of ``torch.func`` another way is taken (``transforms``).
"""

from .crossing import Crossing, Pulled
from .function import Call
from .packing import Packed
from .run import Engine, Run, Tape, UnbalancedFoldError
from .scaling import FLOOR, START, STEP, GradientStats, LossScale, State, Watch, watch_gradients
from .transforms import is_transformed, outside_of_transforms

__all__ = [
    "FLOOR",
    "START",
    "STEP",
    "Call",
    "Crossing",
    "Engine",
    "GradientStats",
    "LossScale",
    "Packed",
    "Pulled",
    "Run",
    "State",
    "Tape",
    "UnbalancedFoldError",
    "Watch",
    "is_transformed",
    "outside_of_transforms",
    "watch_gradients",
]
