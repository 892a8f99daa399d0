"""Which precision pays: a rule from the work of one forward pass, so that the same call always gets the same answer.

Half precision costs time of its own in every product: casts of what goes in and comes out. Products that are too small
do not win that back. How large they have to be was found with AVX512-BF16 and with AMX, by

    python -m benchmarks.speed.paying

which times networks of many sizes in both precisions and prints the work of each beside them. With AMX products have to
be larger: those in float32 are faster there than on processors of other makers. On CUDA half precision is assumed to
pay always, which was not measured.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..modules import HALF, HAS_AMX, OperatorMode, is_transformed, number_of_samples

LEAST = {"convolution": 1e6, "matrix product": 6e6 if HAS_AMX else 3e6}
"""So many multiplications must one of them have on average, in a forward pass, for half precision to pay."""

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and the place of the left factor among their arguments."""

_fastpath = threading.RLock()  # the setting is one for all threads


class Work(OperatorMode):
    """Counts multiplications in the convolutions and matrix products that run inside it.

    Attention is left out: its products are few beside those of the layers around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {kind: [] for kind in LEAST}

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the operator, and count."""
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "convolution":
            input, weight, transposed = args[0], args[1], args[6]
            self.found["convolution"].append((input if transposed else output).numel() * weight[0].numel())
        elif name in _PRODUCTS:
            left: Tensor = args[_PRODUCTS[name]]
            self.found["matrix product"].append(left.shape[-1] * output.numel())
        return output

    def mean(self) -> tuple[str, float]:
        """The kind of product that most multiplications are in, and how many one of them has on average."""
        kind = max(self.found, key=lambda kind: sum(self.found[kind]))
        return kind, sum(self.found[kind]) / max(len(self.found[kind]), 1)


class Choice:
    """What ``dtype="auto"`` comes to for one structure of a model.

    Args:
        asked: the option.
        dtype: what it comes to as long as nothing is known of the work.
        device: where the model is.
        settled: what the work has decided in the model that this one's is a copy of.

    Attributes:
        open: whether the work is still to decide, which is known at the first gradient pass.
        why: the choice in words; empty if none was made.
        settled: whether half precision pays, and why, if the work has decided that.
        dtype: what to begin with.
    """

    def __init__(
        self,
        asked: torch.dtype | Literal["auto"],
        dtype: torch.dtype,
        device: torch.device,
        settled: tuple[bool, str] | None = None,
    ) -> None:
        self.open = asked == "auto" and device.type == "cpu" and dtype in HALF
        self.settled = settled if self.open else None
        self.dtype = dtype if self.settled is None or self.settled[0] else torch.float32
        self._work: Work | None = None
        self._samples = 1
        self._shapes: list[torch.Size] | None = None
        if self.settled is not None:
            self.open, self.why = False, self.settled[1]
        elif asked != "auto":
            self.why = ""
        elif self.open:
            self.why = "until the first gradient pass tells how large its products are"
        else:
            self.why = "the fastest in hardware" if dtype in HALF else "no half precision in hardware"

    @contextmanager
    def counting(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Look at a forward pass of these inputs that is made inside."""
        if not self.open or is_transformed(tensors):  # more samples than it shows may be in a transformed tensor
            yield
            return
        with _fastpath:
            fused = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # no pass with gradients takes it, and it shows no products
            try:
                with Work() as work:
                    yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fused)
        self._work, self._samples, self._shapes = work, max(number_of_samples(tensors), 1), _shapes(tensors)

    def knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether samples of these shapes were looked at, or it does not matter any more."""
        return not self.open or self._shapes == _shapes(tensors)

    def settle(self, samples: int) -> bool:
        """Whether half precision pays, which the first gradient pass, of so many samples, settles for good."""
        if not self.open or self._work is None:
            return True
        self.open = False
        kind, mean = self._work.mean()
        if not mean:  # an LSTM's, say, which one operator holds
            self.why = "the fastest in hardware; its products are not seen"
            self.settled = True, self.why
            return True
        mean *= samples / self._samples
        pays = mean >= LEAST[kind]
        enough = "enough" if pays else "too few"
        self.why = f"a {kind} has {_in_words(mean)} multiplications on average, {enough} for half precision to pay"
        self.settled = pays, self.why
        return pays


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [t.shape[1:] for t in tensors]


def _in_words(number: float) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number:.0f}"
