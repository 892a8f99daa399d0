"""Each operator that runs, seen one by one."""

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode  # as PyTorch's own counter of operations has it


class _Inherited:
    """PyTorch wraps a method of this name that a mode defines, and imports its compiler for that: a second or two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})  # type: ignore[attr-defined]


class OperatorMode(_Inherited, TorchDispatchMode):
    """A context in which each operator goes through :meth:`run`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the operator with these arguments, and give what it gives."""
        return func(*args, **kwargs)
