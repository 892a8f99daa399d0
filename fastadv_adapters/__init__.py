"""Fast adversarial attacks in PyTorch that stay as strong: by a fast copy of the model, for any attack library.

``FastAttackModel`` makes the fast copy, ``SafePGD`` attacks a model, ``compare`` measures on your model what the fast
copy brings, and ``evaluate`` attacks a data set and gives a ``Report``. The core needs PyTorch alone. So the adapters
are imported by name: ``fastadv_adapters.torchattacks``, ``fastadv_adapters.foolbox``, ``fastadv_adapters.autoattack``.
``RobustAccuracy`` is there if torchmetrics is installed.
"""

from typing import TYPE_CHECKING, Any

from .attack import SafePGD as SafePGD
from .boundary import GradientStats as GradientStats
from .boundary import watch_gradients as watch_gradients
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .evaluation import Report as Report
from .evaluation import evaluate as evaluate
from .model import FastAttackModel as FastAttackModel
from .modules import FastAttackWarning as FastAttackWarning
from .modules import with_batch_statistics as with_batch_statistics
from .options import FastAttackOptions as FastAttackOptions

if TYPE_CHECKING:
    from .evaluation.metric import RobustAccuracy as RobustAccuracy

__version__ = "0.2.0"
__all__ = [
    "Comparison",
    "FastAttackModel",
    "FastAttackOptions",
    "FastAttackWarning",
    "GradientStats",
    "Report",
    "SafePGD",
    "compare",
    "evaluate",
    "watch_gradients",
    "with_batch_statistics",
]


def __getattr__(name: str) -> Any:
    """Import what needs another library only when it is asked for."""
    if name == "RobustAccuracy":
        from .evaluation.metric import RobustAccuracy

        return RobustAccuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
