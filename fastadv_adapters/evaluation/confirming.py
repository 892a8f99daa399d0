"""The plain model as judge: every verdict is its own, in its own precision, in batches of one fixed size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attack import accept_classifier, is_random, undecided
from ..comparison import in_own_precision
from ..modules import HALF, in_eval_mode, parameters_of
from .seeds import seed_of, seeded

SIZE = 32
"""How many rows the plain model is always given: kernels may round otherwise in a batch of another size."""

WITHIN = 100
"""Two logits closer than so many units of rounding of the largest might change places in another batch."""

WITHIN_HALF = 4
"""The same in half precision. Its products add up in float32 and round once, to the logit that is written; what layers
before round is nearly the same in any batch. A hundred units would be 0.8 of the largest logit in bfloat16, which
hardly a candidate reaches: a few are 0.03 there, 0.004 in float16."""

PASSES = 9
"""How often a model that draws random numbers is asked; the majority counts."""


@dataclass(frozen=True)
class Verdicts:
    """What the plain model makes of some inputs, each of shape (N,) but ``logits``.

    Attributes:
        logits: (N, C), of the first pass.
        predictions: classes; -1 where there is none, since a logit is NaN or the largest is infinite.
        adversarial: whether that is not the label.
        borderline: whether that is within rounding.
    """

    logits: Tensor
    predictions: Tensor
    adversarial: Tensor
    borderline: Tensor


class Judge:
    """The plain model, in eval mode while it is asked; ``seed`` is that of the random numbers that it may draw.

    Attributes:
        passes: how often it is asked about each sample.
        clearance: the relative distance of two logits that rounding may bridge.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model, self._seed = model, seed
        parameter = next(p for p in parameters_of(model) if p.is_floating_point())
        self.device, self._dtype = parameter.device, parameter.dtype
        self.passes = 1
        self.clearance = (WITHIN_HALF if self._dtype in HALF else WITHIN) * torch.finfo(self._dtype).eps

    def classes(self, x: Tensor) -> int:
        """How many classes the model knows; ValueError if it does not take x, or does not return logits (N, C)."""
        with _evaluating(self._model), seeded(self._seed, self.device):
            return accept_classifier(self._model, x.to(self.device, self._dtype)).shape[1]

    def notice_randomness(self, x: Tensor) -> bool:
        """Ask twice about the same inputs, and from now on more often if the answers differ."""
        first, second = (self.logits(x, 0, number) for number in range(2))
        differs = is_random(first, second)
        self.passes = PASSES if differs else 1
        return differs

    def verdicts(self, x: Tensor, y: Tensor, *names: object) -> Verdicts:
        """What it makes of inputs (N, ...) with these labels; ``names`` seed its random numbers."""
        parts = [self._part(x[i : i + SIZE], y[i : i + SIZE], names) for i in range(0, len(x), SIZE)]
        return Verdicts(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _part(self, x: Tensor, y: Tensor, names: tuple[object, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        asked = [self.logits(x, *names, number) for number in range(self.passes)]
        found = [logits.argmax(1).where(~undecided(logits), -1) for logits in asked]
        votes = torch.stack([classes != y for classes in found]).sum(0)
        broken = 2 * votes > self.passes
        # The prediction is one of a pass that agrees with the majority.
        predictions = found[0]
        for classes in found:
            predictions = torch.where((predictions != y) == broken, predictions, classes)
        if self.passes > 1:
            borderline = (2 * votes - self.passes).abs() <= 1
        else:
            own = asked[0].gather(1, y[:, None]).squeeze(1)
            rival = asked[0].scatter(1, y[:, None], -torch.inf).amax(1)
            largest = asked[0].where(asked[0].isfinite(), 0).abs().amax(1)
            borderline = (own - rival).abs() <= self.clearance * largest
        return asked[0], predictions, broken, borderline

    def logits(self, x: Tensor, *names: object) -> Tensor:
        """Logits of at most SIZE inputs, of one pass, with copies of the first beside them."""
        rows = torch.cat([x, x[:1].expand(SIZE - len(x), *x.shape[1:])]) if len(x) < SIZE else x.clone()
        with _evaluating(self._model), seeded(seed_of(self._seed, "judge", *names), self.device):
            logits: Tensor = self._model(rows.to(self._dtype))
        return logits[: len(x)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, in its own precision and without gradients; afterwards each part is in its mode again."""
    with in_eval_mode(model), in_own_precision(model), torch.inference_mode(False), torch.no_grad():
        yield  # (the last of these enables gradients where it ends)
