"""What is kept of what modules compute from their weights alone, and what one call of a module has made so far."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..boundary import memory_of
from ..modules import autocast
from .keys import tensors_of


@dataclass
class Kept:
    """One result of an operator on tensors that stand still between updates.

    Attributes:
        function, args, kwargs: what was called.
        reads: the tensors that went in.
        result, writes: what came out, and the tensors in it.
        lowered: the dtype of autocast at that call; None if it was off. versions: of all tensors, as last computed.
        asked: whether a later call has got it.
        is_view: whether it is a part of what was read, and needs no computing.
        is_chosen: whether it is such a part, and the value of another tensor may have said which.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[Tensor]
    result: Any
    writes: list[Tensor]
    lowered: torch.dtype | None
    versions: list[int] = field(default_factory=list)
    asked: bool = False

    def __post_init__(self) -> None:
        memory, own = ({memory_of(t) for t in tensors} for tensors in (self.reads, self.writes))
        self.is_view = own <= memory
        # By an integer tensor: others, as in ``view_as``, tell no more than their shape.
        others = [t for t in self.reads if memory_of(t) not in own]
        self.is_chosen = len(others) < len(self.reads) and not all(t.is_floating_point() for t in others)
        self.note()

    @property
    def variant(self) -> tuple[Any, ...]:
        """The operator and the tensors, without constants."""
        return self.function, *map(id, self.reads)

    @property
    def is_outdated(self) -> bool:
        """Whether what went in is no longer what it was."""
        return self.versions[: len(self.reads)] != [t._version for t in self.reads]

    def note(self) -> None:
        """Take down the versions."""
        self.versions = [t._version for t in (*self.reads, *self.writes)]

    def holds(self) -> bool:
        """Whether nobody has written into what went in or came out, or has begun a graph there."""
        return not any(t.requires_grad for t in self.writes) and self.versions == [
            t._version for t in (*self.reads, *self.writes)
        ]

    def compute(self) -> bool:
        """Compute it again, in place; whether it has the shapes that it had, for others might be broadcast."""
        if not self.is_view:
            with autocast(self.reads[0].device.type, self.lowered):
                new = list(tensors_of(self.function(*self.args, **self.kwargs)))
            if [t.shape for t in new] != [t.shape for t in self.writes]:
                return False
            for own, t in zip(self.writes, new, strict=True):
                own.copy_(t)
        self.note()
        return True


class Stage:
    """What one thread's outermost call of a module has made so far.

    Attributes:
        made: like what is kept, with the tensors that went in.
        still: the tensors that came out, by identity.
    """

    def __init__(self) -> None:
        self.made = dict[Any, tuple[Kept | None, list[Tensor]]]()
        self.still = dict[int, Tensor]()

    def stage(self, key: Any, one: Kept | None, reads: list[Tensor]) -> None:
        """Note a result; None if it cannot be kept."""
        self.made[key] = one, reads
        self.still.update({id(t): t for t in (one.writes if one else ())})

    def give_up(self, opened: Tensor) -> None:
        """Let nothing be kept that shares the memory of a tensor."""
        for identity in [i for i, t in self.still.items() if memory_of(t) == memory_of(opened)]:
            del self.still[identity]
        for key, (one, reads) in list(self.made.items()):
            if one is not None and any(memory_of(t) == memory_of(opened) for t in one.writes):
                self.made[key] = None, reads

    def variants(self, variant: Any) -> int:
        """How many results of this operator on these tensors it has."""
        return sum(one is not None and one.variant == variant for one, _ in self.made.values())
