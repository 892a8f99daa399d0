"""Passes that attacks of other libraries take, counted where they call the fast model."""

from types import TracebackType
from typing import Any

from torch import Tensor

from ..model import FastAttackModel


class Counter:
    """Counts the rows of all passes through any view of a fast model, while it is entered.

    Args:
        fast: the fast model; its statistics count backward passes.

    Attributes:
        forward: rows of forward passes.
        backward: rows of backward passes.
    """

    def __init__(self, fast: FastAttackModel) -> None:
        self._fast = fast
        self.forward = self.backward = 0

    def __enter__(self) -> "Counter":
        self._before = self._fast.gradient_stats.samples
        self._handle = self._fast.register_forward_pre_hook(self._count)  # which all views share
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        self.backward += self._fast.gradient_stats.samples - self._before

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.forward += next((len(t) for t in inputs if isinstance(t, Tensor)), 0)
