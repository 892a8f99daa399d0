"""Models that refuse what they are asked beside their call: a few samples of it alone, say, or another precision."""

from contextlib import AbstractContextManager
from types import TracebackType

from .inputs import is_out_of_memory


class _Borne(AbstractContextManager[None, bool]):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, Exception) and not is_out_of_memory(error)


def refusals_borne() -> AbstractContextManager[None, bool]:
    """Go on behind the block if it raises, unless it ran out of memory, which says nothing of the model."""
    return _Borne()
