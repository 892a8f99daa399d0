"""Which samples lost gradient entries, for those who want to know it of their own passes alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class Watch:
    """Collects which samples lost gradient entries; see :func:`watch_gradients`.

    Attributes:
        spoilt: bool tensor (N,), True for samples with a non-finite entry in any watched pass; None before the first.
    """

    def __init__(self) -> None:
        self.spoilt: Tensor | None = None

    def add(self, spoilt: Tensor) -> None:
        """Note the spoilt samples of one pass.

        Raises:
            ValueError: another number of samples than in the passes before.
        """
        if self.spoilt is not None and self.spoilt.shape != spoilt.shape:
            raise ValueError(
                f"expected passes of {len(self.spoilt)} samples inside one watch_gradients(), got one of "
                f"{len(spoilt)}: watch batches of each size in a block of their own"
            )
        self.spoilt = spoilt if self.spoilt is None else self.spoilt | spoilt


WATCHES: ContextVar[tuple[Watch, ...]] = ContextVar("watches", default=())
"""Those that forward passes of this thread report to now."""


@contextmanager
def watch_gradients() -> Iterator[Watch]:
    """Watch the backward passes of all forward passes that are made inside the block, also those that come later.

    All of them must have the same number of samples. So do not run an attack inside that drops samples (early stop,
    AutoAttack), or that attacks some again (``SafePGD``). Nothing waits for the device.

    Yields:
        An object whose ``spoilt`` is None before the first backward pass, and then a bool tensor (N,), True for samples
        with an infinite or NaN entry in the gradient of any of the passes. After a pass in half
        precision on a CPU these are the samples that full precision, in which they are run again, does not mend.

    Raises:
        ValueError: in a backward pass with another number of samples than those before.
    """
    watch = Watch()
    token = WATCHES.set((*WATCHES.get(), watch))
    try:
        yield watch
    finally:
        WATCHES.reset(token)
