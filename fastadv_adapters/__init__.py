"""Fast, honest adversarial attacks in PyTorch: a model object that attack libraries take as it is.

``FastAttackModel`` wraps a model, ``SafePGD`` attacks one. The adapters are imported by name, so that the core needs
PyTorch alone: ``fastadv_adapters.torchattacks`` and ``fastadv_adapters.foolbox``.
"""

from .model import FastAttackModel as FastAttackModel
from .modules.notices import FastAttackWarning as FastAttackWarning
from .attack.safe_pgd import SafePGD as SafePGD
from .boundary.scaling import GradientStats as GradientStats
from .boundary.scaling import watch_gradients as watch_gradients

__version__ = "0.1.0"
__all__ = ["FastAttackModel", "FastAttackWarning", "GradientStats", "SafePGD", "watch_gradients"]
