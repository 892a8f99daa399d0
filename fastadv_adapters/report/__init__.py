"""What was done with a model, as text: ``summary``, with the layers that tensor cores cannot use (``alignment``)."""

from .summary import summarise

__all__ = ["summarise"]
