"""``SafePGD``: projected gradient descent that no vanishing loss, half precision or broken gradient makes weaker."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..model import FastAttackModel
from .balls import Norm, accept_norm, ball_around
from .checks import accept_bounds, accept_count, accept_generator, accept_inputs, accept_size
from .losses import LossFunction, LossName, resolve_loss
from .pool import Best
from .rounding import has_float64
from .search import Search, Settings
from .steps import step_sizes


class SafePGD:
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083) in the L-infinity, L2 or L1 norm.

    Safe means: the loss does not saturate and is computed in float64; samples whose gradient was not finite in any
    step, or that the fast model alone holds to be adversarial, are attacked again in full precision; what is returned
    is the best candidate seen, lies within ``eps`` (for ``"linf"`` exactly, measured in float64; for the others up to
    float32 rounding of the norm) and within ``bounds``, and is never NaN.

    Args:
        model: a ``FastAttackModel``, or any ``nn.Module``, which is attacked as it is, in eval mode and full precision.
            Called with x it returns logits (N, C).
        eps: the largest perturbation, in units of x and of the norm.
        alpha: the size of every step in the same units; None for steps that fall from ``2 * eps`` (``eps`` for
            ``"l1"``) in a straight line towards 0, see :attr:`step_sizes`.
        steps: gradient steps per restart, at least 0.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        random_start: whether each restart begins at a random point of the ball. If not, all restarts would be the
            same, and one is made.
        restarts: how often to start, at least 1.
        targeted: whether labels are targets to be reached instead of classes to be left.
        loss: ``"auto"``, which does not depend on the scale of the logits, ``"ce"`` (the safe cross entropy),
            ``"dlr"``, ``"margin"`` or a callable ``loss(logits, labels) -> (N,)``, to be maximised; see
            :func:`fastadv_adapters.attack.resolve_loss`.
        bounds: the least and the largest value of an input; taken in x's dtype.
        early_stop: whether samples are dropped from the batch once exact decisions confirm that they are adversarial.
            Cheaper, and breaks the same samples; what is returned for them is the first adversarial candidate instead
            of the one with the highest loss. Waits for the device in every step. Where every new shape costs (engines
            other than ``"eager"``) what is left is filled up with copies of one sample to a power of two; their
            results are not used, but ``gradient_stats`` counts them.
        generator: where random starts come from; None for PyTorch's global one. It may live on the CPU while x does
            not; then the starts are those of a CPU.

    Attributes:
        alpha: as given: None, or the size of every step.
        model: the fast model; a plain one is wrapped once, here.
        exact: its view with exact decisions.
        before: None, or set after construction, a differentiable function of x (N, ...) whose result the model is given
            in the place of x.

    Raises:
        TypeError, ValueError: a setting, the model or an input is not as described.
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
    ) -> None:
        self.eps = accept_size("eps", eps)
        self.steps = accept_count("steps", steps, least=0)
        self.alpha = None if alpha is None else accept_size("alpha", alpha)
        self.norm = accept_norm(norm)
        self.random_start = random_start
        self.restarts = accept_count("restarts", restarts, least=1)
        self.targeted = targeted
        self.loss = resolve_loss(loss, targeted)
        self.bounds = accept_bounds(bounds)
        self.early_stop = early_stop
        self.generator = accept_generator(generator)
        self.before: Callable[[Tensor], Tensor] | None = None
        self.model = model if isinstance(model, FastAttackModel) else plain(model)
        wide = torch.float64 if has_float64(self.model.device) else torch.float32
        self._fast = self.model.view(decisions="fast", logits_dtype=wide)
        self._full = self.model.view(decisions="fast", logits_dtype=wide, full_precision=True)
        self.exact = self.model.view(decisions="exact", logits_dtype=wide)

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """The size of each step, in units of x and of the norm; see :func:`fastadv_adapters.pgd_steps.step_sizes`."""
        return step_sizes(self.norm, eps=self.eps, steps=self.steps, alpha=self.alpha)

    def __repr__(self) -> str:
        names = ("eps", "alpha", "steps", "norm", "random_start", "restarts", "targeted")
        settings = [f"{name}={getattr(self, name)!r}" for name in names]
        settings += [f"loss={self.loss.name!r}", f"bounds={self.bounds!r}", f"early_stop={self.early_stop!r}"]
        return f"SafePGD({', '.join(settings)})"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Attack a batch.

        Args:
            x: shape (N, ...), floating, within ``bounds``, on the model's device. Not changed.
            y: shape (N,), integer: the true classes, or with ``targeted`` the classes to be reached. Not changed.

        Returns:
            Adversarial inputs with x's shape, dtype and device, without history.

        Raises:
            TypeError, ValueError: an input or the model's output is not as described.
        """
        device = next(self.model.parameters()).device  # asked this way, a model that has been moved is noticed
        largest = accept_inputs(x, y, device, self.bounds)
        with torch.inference_mode(False), torch.no_grad():
            found = Best.none(x.detach().clone())
            if len(x):
                ball = ball_around(self.norm, x, eps=self.eps, bounds=self.bounds)
                search = Search(self._settings(), ball, y.to(torch.int64, copy=True), largest, self._seeds(), found)
                doubtful = search.run(self._fast, torch.arange(len(x), device=x.device))
                if len(doubtful):
                    search.run(self._full, doubtful)
            return found.x

    def _settings(self) -> Settings:
        return Settings(
            fast=self._fast,
            exact=self.exact,
            before=self.before,
            loss=self.loss,
            targeted=self.targeted,
            step_sizes=self.step_sizes,
            random_start=self.random_start,
            generator=self.generator,
            early_stop=self.early_stop,
            shapes_cost=self.model.engine != "eager",
        )

    def _seeds(self) -> list[int]:
        """One seed per restart: starts are drawn again for a second attack, instead of kept."""
        if not self.random_start:
            return [0]
        device = self.generator.device if self.generator else "cpu"
        seeds: list[int] = torch.randint(2**62, (self.restarts,), generator=self.generator, device=device).tolist()
        return seeds


def plain(model: nn.Module) -> FastAttackModel:
    """Wrap a plain model so that its own eval-mode function is attacked, in full precision and with nothing folded."""
    parameters: Iterable[Tensor] = getattr(model, "parameters", tuple)()  # what is no module is refused below
    double = any(p.dtype == torch.float64 for p in parameters)
    return FastAttackModel(model, dtype=torch.float64 if double else torch.float32, fuse_bn=False, channels_last=False)
