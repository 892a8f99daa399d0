"""Fast, honest adversarial attacks in PyTorch: a model object that attack libraries take as it is."""

from .model import FastAttackModel as FastAttackModel
from .notices import FastAttackWarning as FastAttackWarning
from .scaling import GradientStats as GradientStats
from .scaling import watch_gradients as watch_gradients

__version__ = "0.1.0"
__all__ = ["FastAttackModel", "FastAttackWarning", "GradientStats", "watch_gradients"]
