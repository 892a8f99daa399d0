"""My model, measured: whether the fast one is faster and faithful, and what a pass keeps for the backward pass.

``comparing`` makes an attack (``attacking``) on the plain model and on fast ones, in turn (``timing``), and looks how
near gradients are to float64 (``fidelity``) and how many bytes they keep (``memory``). Each way is a ``row`` of the
``result``, which is shown as a table (``showing``), drawn (``drawing``) and written whole (``writing``). ``device``
describes what it ran on, ``progress`` tells what is being done. The benchmarks use the same clock.
"""

from .comparing import compare
from .device import describe_device, versions
from .fidelity import row_cosines
from .memory import BytesKept, bytes_kept
from .result import Comparison
from .row import Row
from .timing import Timing, Way, measure_in_turn, reason, seconds_of, synchronize
from .writing import expect_picture, expect_writable, write_picture, write_whole

__all__ = [
    "BytesKept",
    "Comparison",
    "Row",
    "Timing",
    "Way",
    "bytes_kept",
    "compare",
    "describe_device",
    "expect_picture",
    "expect_writable",
    "measure_in_turn",
    "reason",
    "row_cosines",
    "seconds_of",
    "synchronize",
    "versions",
    "write_picture",
    "write_whole",
]
