"""``SafePGD``: projected gradient descent that no vanishing loss, half precision or spoilt gradient makes weaker."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from ..modules import LeftOut, accept_flag, notify, parameters_of, widest_on
from .balls import Norm, accept_norm, ball_around
from .checks import (
    accept_bounds,
    accept_classes,
    accept_count,
    accept_generator,
    accept_inputs,
    accept_size,
    accept_targets,
)
from .cycles import can_cycle
from .doubts import doubt_budget, doubt_steps
from .looking import Settings, Start
from .losses import Loss, LossFunction, LossName, asked_of, resolve_loss
from .objectives import AnotherClass, HigherLoss, Objective
from .pool import Best
from .search import Search
from .steps import radii, step_sizes
from .targets import Need, Targets, has_classes, need_of_classes, refuse_need


class SafePGD(LeftOut):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083) in the L-infinity, L2 or L1 norm.

    Safe means:

    - The loss is computed in float64 (float32 on devices without it, and for a callable that raises an error in
      float64). ``"auto"``, ``"ce"`` and ``"margin"`` do not saturate. If the gradient of ``"dlr"`` or of a callable on
      class labels is all zero or not finite at a sample's logits, that step follows the margin.
    - A sample is attacked again in full precision if its gradient was not finite in some step and was not mended at
      once, if its logits were not finite, or if the fast model alone calls its candidate adversarial.
    - The result is the best candidate that was seen (with ``early_stop`` the first adversarial one). It lies within
      ``bounds`` and within ``eps``: for ``"linf"`` exactly, measured in float64, for the others up to float32 rounding
      of the norm. It is never NaN.

    Args:
        model: a ``FastAttackModel``, or any ``nn.Module``, which is attacked as it is, in eval mode and full precision.
            Called with x it returns logits (N, C), or without ``classes`` whatever the loss takes.
        eps: the largest perturbation, in units of x and of the norm.
        alpha: the size of every step in the same units; None for steps that get shorter, from ``2 * eps`` (``eps`` for
            ``"l1"``) in a straight line towards 0, see :attr:`step_sizes`. With None in ``"l1"``, if there
            are 6 steps or more, the first half walks in a larger ball, which shrinks from 2.5 eps to ``eps``, by steps
            longer by the same factor; only what lies within ``eps`` is a candidate.
        steps: gradient steps per restart, at least 0.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        random_start: whether each restart begins at a random point of the ball. If not, all restarts would be the
            same, and one is made.
        restarts: how often to start, at least 1.
        targeted: whether labels are targets to be reached instead of classes to be left.
        loss: ``"auto"``, which does not depend on the scale of the logits, ``"ce"`` (the safe cross entropy),
            ``"dlr"``, ``"margin"`` or a callable ``loss(logits, labels) -> (N,)``, to be maximised; see
            :func:`fastadv_adapters.attack.resolve_loss`. For adversarial training on
            labels take ``"ce"``; for another training loss (TRADES, MART) a callable, with ``classes=False``.
        bounds: the least and the largest value of an input; rounded to x's dtype.
        early_stop: whether samples are dropped from the batch once exact decisions confirm that they are adversarial.
            Cheaper, and breaks the same samples; the result for them is the first adversarial candidate instead of the
            one with the highest loss. Waits for the device in every step. With engines other than ``"eager"`` the batch
            is filled up to a power of two with copies of a sample; ``gradient_stats`` counts these. With a constant
            ``alpha`` and the loss ``"ce"``, ``"margin"`` or ``"dlr"`` a sample also leaves the batch, until the next
            start, once its iterates repeat (arXiv:2503.19347); see "Early stop" in the guide.
        generator: where random starts come from; None for PyTorch's global one. It may live on the CPU while x does
            not; then the starts are those of a CPU.
        classes: whether y holds class labels and the model gives logits. None: yes if y is of integers with shape (N,).
            With classes an adversarial candidate outranks one with a higher loss. If the loss alone is to decide, give
            False. The loss is then a callable ``loss(outputs, targets) -> (N,)``, with the model's outputs and y (the
            rows of the samples at hand) of any kind. Then samples are attacked again in full precision only if they
            were spoilt, and ``early_stop`` and ``targeted`` are errors. Without a random start the attack begins near
            x: normal noise is added with a standard deviation of a thousandth of the range of ``bounds``, or of
            ``eps / 10`` if that is less. (A divergence from the clean output, as in TRADES, has no gradient at x
            itself.)

    Attributes:
        model: the fast model; a plain one is wrapped once, here or when it is set.
        exact: the view of ``model`` with exact decisions.
        before: None; may be set to a differentiable function (N, ...) -> (N, ...) that is applied to x before the
            model. Each row of its result depends on the same row of x alone.

    All settings are attributes of the same name, which may be set later: the next call has them. ``loss`` is read as a
    :class:`~fastadv_adapters.attack.Loss`, and set as here.

    Raises:
        TypeError, ValueError: a setting, the model or an input is not as described.

    Warns:
        FastAttackWarning: once, if ``eps`` or ``alpha`` seems to be in other units than the images are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        alpha: float | None = None,
        steps: int = 10,
        norm: Norm = "linf",
        random_start: bool = True,
        restarts: int = 1,
        targeted: bool = False,
        loss: LossName | LossFunction = "auto",
        bounds: tuple[float, float] = (0.0, 1.0),
        early_stop: bool = False,
        generator: torch.Generator | None = None,
        classes: bool | None = None,
    ) -> None:
        self.eps, self.steps, self.alpha, self.norm = eps, steps, alpha, norm
        self.random_start, self.restarts, self.targeted = random_start, restarts, targeted
        self.loss = loss
        self.bounds, self.early_stop = bounds, early_stop
        self.generator, self.classes = generator, classes
        refuse_need(self.classes, self._need)
        self._doubted = False
        self.before: Callable[[Tensor], Tensor] | None = None
        self.model = model

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting whenever it is set; what settings need of each other is checked when the attack is called."""
        super().__setattr__(name, _CHECKS[name](value) if name in _CHECKS else value)

    @property
    def model(self) -> FastAttackModel:
        """The fast model; a plain one is wrapped once, when it is set."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model if isinstance(model, FastAttackModel) else plain(model)
        wide = widest_on(self._model.device)
        self._fast = self._model.view(decisions="fast", logits_dtype=wide)
        self._full = self._model.view(decisions="fast", logits_dtype=wide, full_precision=True)
        self.exact = self._model.view(decisions="exact", logits_dtype=wide)

    @property
    def loss(self) -> Loss:
        """What is maximised, in the direction that ``targeted`` asks for at present."""
        return self._losses[self.targeted]

    @loss.setter
    def loss(self, loss: LossName | LossFunction | Loss) -> None:
        self._asked = asked_of(loss)
        self._losses = [resolve_loss(self._asked, targeted) for targeted in (False, True)]

    @property
    def _need(self) -> Need | None:
        return need_of_classes(self._asked, targeted=self.targeted, early_stop=self.early_stop)

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """The size of each step, in units of x and of the norm; see :func:`fastadv_adapters.attack.step_sizes`.

        In the larger ball of the first default steps in ``"l1"`` (see ``alpha``) a step is longer than this, by as much
        as the ball is larger than ``eps``.
        """
        return step_sizes(self.norm, eps=self.eps, steps=self.steps, alpha=self.alpha)

    def __repr__(self) -> str:
        names = ("eps", "alpha", "steps", "norm", "random_start", "restarts", "targeted")
        settings = [f"{name}={getattr(self, name)!r}" for name in names]
        settings += [f"loss={self.loss.name!r}", f"bounds={self.bounds!r}", f"early_stop={self.early_stop!r}"]
        settings += [] if self.classes is None else [f"classes={self.classes!r}"]
        return f"SafePGD({', '.join(settings)})"

    def __call__(self, x: Tensor, y: Any) -> Tensor:
        """Attack a batch.

        Args:
            x: shape (N, ...), floating, within ``bounds``, on the model's device. Not changed.
            y: with classes of shape (N,), integer: the true ones, or with ``targeted`` those to be reached; the loss is
                given int64. Otherwise a tensor, or a tree of tensors (tuples, lists, dictionaries), each with N rows
                and on x's device: clean probabilities, soft labels, embeddings; or None. Dtypes are kept. The loss is
                given the rows of exactly the samples whose outputs it is given. Not changed.

        Returns:
            Adversarial inputs with x's shape, dtype and device, without history.

        Raises:
            TypeError, ValueError: an input or the model's output is not as described.
        """
        classes = has_classes(x, y, classes=self.classes, need=self._need)
        device = next(self.model.parameters()).device  # asked this way, a model that has been moved is noticed
        objective = self._objective(x, y, device, classes=classes)
        self._doubt(x[0].numel() if len(x) else 0)
        with torch.inference_mode(False), torch.no_grad():
            found = Best.none(x.detach().clone())
            if len(x):
                ball = ball_around(self.norm, x, eps=self.eps, bounds=self.bounds)
                settings, targets = self._settings(classes=classes), Targets.of(y, classes=classes)
                search = Search(settings, objective, ball, targets, self._seeds(settings.start), found)
                doubtful = search.run(self._fast, torch.arange(len(x), device=x.device))
                if len(doubtful):
                    search.run(self._full, doubtful)
            return found.x

    def _doubt(self, coordinates: int) -> None:
        """Warn once of a budget, or of steps, in other units than the images are in."""
        doubt = doubt_budget(self.eps, self.norm, self.bounds, coordinates) if coordinates else None
        doubt = doubt or doubt_steps(self.eps, self.alpha, self.steps)
        if doubt and not self._doubted:
            self._doubted = True
            notify(f"SafePGD: {doubt}", "budget-units")

    def _objective(self, x: Any, y: Any, device: torch.device, *, classes: bool) -> Objective:
        """What is wanted, after a look at what came in."""
        if classes:
            return AnotherClass(self.loss, self.targeted, accept_inputs(x, y, device, self.bounds))
        accept_targets(x, y, device, self.bounds)
        return HigherLoss(self.loss)

    def _settings(self, *, classes: bool) -> Settings:
        return Settings(
            fast=self._fast,
            exact=self.exact,
            before=self.before,
            step_sizes=self.step_sizes,
            radii=radii(self.norm, steps=self.steps, alpha=self.alpha),
            start="random" if self.random_start else "origin" if classes else "beside",
            generator=self.generator,
            early_stop=self.early_stop,
            stops_cycles=self.early_stop and self.loss.repeats and can_cycle(self.step_sizes, self.model.device),
            shapes_cost=self.model.engine != "eager",
        )

    def _seeds(self, start: Start) -> list[int]:
        """One seed per restart: starts are drawn again for a second attack, instead of kept."""
        if start == "origin":
            return [0]
        device = self.generator.device if self.generator else "cpu"
        count = self.restarts if self.random_start else 1
        seeds: list[int] = torch.randint(2**62, (count,), generator=self.generator, device=device).tolist()
        return seeds


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "eps": partial(accept_size, "eps"),
    "alpha": lambda alpha: None if alpha is None else accept_size("alpha", alpha),
    "steps": partial(accept_count, "steps", least=0),
    "norm": accept_norm,
    "random_start": partial(accept_flag, "random_start"),
    "restarts": partial(accept_count, "restarts", least=1),
    "targeted": partial(accept_flag, "targeted"),
    "bounds": accept_bounds,
    "early_stop": partial(accept_flag, "early_stop"),
    "generator": accept_generator,
    "classes": accept_classes,
}
"""What a setting is accepted by, which returns it as it is kept."""


def plain(model: nn.Module) -> FastAttackModel:
    """Wrap a plain model so that its own eval-mode function is attacked, in full precision and with nothing folded."""
    is_module: bool = isinstance(model, nn.Module)  # what is none is refused below
    double = is_module and any(p.dtype == torch.float64 for p in parameters_of(model))
    return FastAttackModel(model, dtype=torch.float64 if double else torch.float32, fuse_bn=False, channels_last=False)
