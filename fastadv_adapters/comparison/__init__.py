"""My model, measured: whether the fast one is faster and faithful, and what a pass keeps for the backward pass.

``comparing`` runs an attack (``attacking``), with the budget that it has (``budgets``), on a batch (``data``): on the
plain model, which is left as it was (``leaving``), and on fast ones, in turn (``timing``). It looks how near gradients
are to float64 (``fidelity``) and how many bytes they keep (``memory``). Each way is a ``row`` of the ``result``, which
is shown as a table (``showing``, which also tells what is being done), drawn (``drawing``) and written whole
(``writing``). ``device`` describes what it ran on. The benchmarks use the same clock.
"""

from .attacking import copy_of, refuse_class, refuse_labels_for_targets
from .budgets import MARGIN, Own, doubt_own, extent, is_from, own_budget, parts_of, reach
from .comparing import compare
from .device import describe_device, versions
from .fidelity import row_cosines
from .leaving import in_own_precision, lent_in_eval_mode
from .memory import BytesKept, bytes_kept
from .result import Comparison
from .row import Row
from .timing import Timing, Way, measure_in_turn, reason, seconds_of, synchronize
from .writing import expect_picture, expect_writable, write_json, write_picture

__all__ = [
    "MARGIN",
    "BytesKept",
    "Comparison",
    "Own",
    "Row",
    "Timing",
    "Way",
    "bytes_kept",
    "compare",
    "copy_of",
    "describe_device",
    "doubt_own",
    "expect_picture",
    "expect_writable",
    "extent",
    "in_own_precision",
    "is_from",
    "lent_in_eval_mode",
    "measure_in_turn",
    "own_budget",
    "parts_of",
    "reach",
    "reason",
    "refuse_class",
    "refuse_labels_for_targets",
    "row_cosines",
    "seconds_of",
    "synchronize",
    "versions",
    "write_json",
    "write_picture",
]
