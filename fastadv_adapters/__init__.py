"""Fast, honest adversarial attacks in PyTorch: a model object that attack libraries take as it is.

``FastAttackModel`` wraps a model, ``SafePGD`` attacks one. The adapters are imported by name, so that the core needs
PyTorch alone: ``fastadv_adapters.torchattacks`` and ``fastadv_adapters.foolbox``.
"""

from .attack import SafePGD as SafePGD
from .boundary import GradientStats as GradientStats
from .boundary import watch_gradients as watch_gradients
from .model import FastAttackModel as FastAttackModel
from .modules import FastAttackWarning as FastAttackWarning
from .options import FastAttackOptions as FastAttackOptions

__version__ = "0.2.0"
__all__ = ["FastAttackModel", "FastAttackOptions", "FastAttackWarning", "GradientStats", "SafePGD", "watch_gradients"]
