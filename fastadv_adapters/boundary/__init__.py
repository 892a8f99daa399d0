"""What happens to tensors on the way into a fast network and out of it.

A call is packed (``packing``, ``opening``) and run as one autograd Function (``function``) by whatever implements the
protocols in ``run``. Half precision ends at the last matrix layers (``ends``). On the way back ``crossing`` scales each
sample's gradient there, unscales it in float32 at the input, and filters it (``scaling``, ``powers``). Inside the
transforms of ``torch.func`` another way is taken (``transforms``).
"""

from .crossing import Crossing, Pulled, Rows
from .ends import Cuts, Ends, ends_of, find_ends, is_full_above, mark_ends, matrix_calls
from .function import Call
from .packing import Packed
from .run import Engine, Run, Tape, UnbalancedFoldError
from .scaling import FLOOR, START, STEP, GradientStats, LossScale, State, Watch, scale, shift_for, watch_gradients
from .transforms import is_transformed, outside_of_transforms

__all__ = [
    "FLOOR",
    "START",
    "STEP",
    "Call",
    "Crossing",
    "Cuts",
    "Ends",
    "Engine",
    "GradientStats",
    "LossScale",
    "Packed",
    "Pulled",
    "Rows",
    "Run",
    "State",
    "Tape",
    "UnbalancedFoldError",
    "Watch",
    "ends_of",
    "find_ends",
    "is_full_above",
    "is_transformed",
    "mark_ends",
    "matrix_calls",
    "outside_of_transforms",
    "scale",
    "shift_for",
    "watch_gradients",
]
