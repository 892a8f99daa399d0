"""What happens to tensors on the way into a fast network and out of it.

A call is packed (``packing``, ``opening``) and run as one autograd Function (``function``) by whatever implements the
protocols in ``run``. Half precision ends at the last matrix layers (``ends``). On the way back ``crossing`` scales each
sample's gradient there, unscales it in float32 at the input, and filters it (``scaling``, on processors ``on_host``, on
accelerators ``on_device`` and ``powers``); ``watching`` tells who asks which samples lost entries.
"""

import torch

from .crossing import Crossing, Pulled, Rows, State, mark_rewritten, memory_of
from .ends import (
    Cuts,
    Ends,
    depends_on,
    dtypes_below,
    ends_of,
    find_ends,
    is_full_above,
    is_product,
    mark_ends,
    matrix_calls,
    with_siblings,
)
from .function import Call
from .on_device import DeviceState
from .on_host import HostState
from .packing import Packed, pack_arguments
from .run import Engine, Run, Tape, UnbalancedFoldError
from .scaling import FLOOR, START, STEP, GradientStats, LossScale, scale
from .watching import Watch, watch_gradients


def state_on(device: torch.device) -> State:
    """What the boundary of a model on this device remembers."""
    return HostState(device) if device.type == "cpu" else DeviceState(device)


__all__ = [
    "FLOOR",
    "START",
    "STEP",
    "Call",
    "Crossing",
    "Cuts",
    "DeviceState",
    "Ends",
    "Engine",
    "GradientStats",
    "HostState",
    "LossScale",
    "Packed",
    "Pulled",
    "Rows",
    "Run",
    "State",
    "Tape",
    "UnbalancedFoldError",
    "Watch",
    "depends_on",
    "dtypes_below",
    "ends_of",
    "find_ends",
    "is_full_above",
    "is_product",
    "mark_ends",
    "mark_rewritten",
    "matrix_calls",
    "memory_of",
    "pack_arguments",
    "scale",
    "state_on",
    "watch_gradients",
    "with_siblings",
]
