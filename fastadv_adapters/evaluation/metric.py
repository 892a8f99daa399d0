"""``RobustAccuracy``: the robust accuracy as a metric of torchmetrics, whose sums are reduced over processes."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import Norm, SafePGD
from ..comparison import lent_in_eval_mode
from ..model import FastAttackModel
from .confirming import Judge

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "expected the package torchmetrics to be installed for RobustAccuracy, got none: pip install torchmetrics"
    ) from error


_numbers = itertools.count()


@dataclass(eq=False)
class _Held:
    """Model, attack and seed of a metric, no submodules of it.

    Copies of the metric share them, unless the model is copied too. That is known once the whole copy is made.
    """

    fast: FastAttackModel
    attack: Callable[[Tensor, Tensor], Tensor]
    seed: int
    copied: dict[int, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        held = self.settled()
        return _Held(held.fast, held.attack, held.seed, memo)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self.settled())}

    def settled(self) -> "_Held":
        """With the copies of model and attack, if the model was copied."""
        copied, self.copied = self.copied, None
        if copied is not None and id(self.fast.wrapped) in copied:
            self.fast, self.attack = copy.deepcopy((self.fast, self.attack), copied)
        return self


class RobustAccuracy(Metric):
    """The share of samples that a model classifies as labelled, as they are and under attack.

    A metric of torchmetrics: ``update(x, y)`` attacks a batch, ``compute()`` gives the share of all samples since the
    last ``reset()``, over all processes. The plain model, in eval mode, judges.

    Args:
        model: the plain model, which is wrapped with the default options, or a
            :class:`~fastadv_adapters.FastAttackModel`; it may be trained in between. It is no submodule: ``to()`` and
            ``state_dict()`` of the metric leave it alone, and copies of the metric share it.
        eps: the budget, in units of x and of the norm.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: the least and the largest value of an input.
        steps: gradient steps of ``SafePGD``, which runs with ``early_stop=True``. Its random starts come from PyTorch's
            global generator.
        attack: in the place of SafePGD, called as ``attack(x, y)``; its budget is its own. (A function that encloses a
            model is not copied with the metric: give an object.)
        seed: of random numbers that the model may draw.
        **kwargs: of ``torchmetrics.Metric``.

    Shape:
        - x: (N, ...), floating, within ``bounds``.
        - y: (N,), integers.
        - ``compute()``: a number between 0 and 1, float32.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    standing: Tensor
    total: Tensor
    number: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        steps: int = 20,
        attack: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        fast = model if isinstance(model, FastAttackModel) else FastAttackModel(model)
        own = SafePGD(fast, eps=eps, norm=norm, bounds=bounds, steps=steps, early_stop=True)
        self._held = _Held(fast, attack or own, seed)
        self.add_state("standing", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")
        # A MetricCollection updates only one of several metrics whose states are equal.
        self.add_state("number", default=torch.tensor(next(_numbers)), dist_reduce_fx="max")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Attack a batch and count."""
        if not len(x):
            return
        held = self._held.settled()
        model = held.fast.update().wrapped  # up to date, whatever its options are: it is judged as it is
        judge = Judge(model, held.seed)
        with lent_in_eval_mode(model), torch.inference_mode(False), torch.enable_grad():  # torchmetrics disables it
            found = held.attack(x, y)
        y = y.to(torch.int64)
        fell = judge.verdicts(found, y, "attacked").adversarial & found.flatten(1).isfinite().all(1)
        broken = judge.verdicts(x, y, "clean").adversarial | fell
        self.standing += (~broken).sum().to(self.standing.device)
        self.total += len(y)

    def compute(self) -> Tensor:
        """The share of samples that stand; NaN if there were none."""
        return self.standing.float() / self.total
