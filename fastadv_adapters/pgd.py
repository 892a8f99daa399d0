"""``SafePGD``: projected gradient descent that no vanishing loss, half precision or broken gradient makes weaker."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .losses import LossFunction, resolve_loss
from .model import FastAttackModel
from .norms import Ball, accept_norm, ball_around
from .pgd_checks import accept_bounds, accept_count, accept_generator, accept_inputs, accept_logits, accept_size
from .pgd_pool import Best, Pool
from .rounding import has_float64
from .scaling import Watch, watch_gradients


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
        alpha: the step size in the same units; None for ``2.5 * eps / steps``.
        steps: gradient steps per restart, at least 0.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        random_start: whether each restart begins at a random point of the ball. If not, all restarts would be the
            same, and one is made.
        restarts: how often to start, at least 1.
        targeted: whether labels are targets to be reached instead of classes to be left.
        loss: ``"ce"``, ``"dlr"``, ``"margin"`` or a callable ``loss(logits, labels) -> (N,)``, to be maximised; see
            :func:`fastadv_adapters.losses.resolve_loss`.
        bounds: the least and the largest value of an input; taken in x's dtype.
        early_stop: whether samples are dropped from the batch once exact decisions confirm that they are adversarial.
            Cheaper, and breaks the same samples; what is returned for them is the first adversarial candidate instead
            of the one with the highest loss. Waits for the device in every step.
        generator: where random starts come from; None for PyTorch's global one. It may live on the CPU while x does
            not; then the starts are those of a CPU.

    Attributes:
        model: the fast model; a plain one is wrapped once, here.
        exact: its view with exact decisions.
        before: a differentiable function between x and the model, or None.

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
        norm: str = "linf",
        random_start: bool = True,
        restarts: int = 1,
        targeted: bool = False,
        loss: str | LossFunction = "ce",
        bounds: tuple[float, float] = (0.0, 1.0),
        early_stop: bool = False,
        generator: torch.Generator | None = None,
        _before: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.eps = accept_size("eps", eps)
        self.steps = accept_count("steps", steps, least=0)
        self.alpha = 2.5 * self.eps / max(self.steps, 1) if alpha is None else accept_size("alpha", alpha)
        self.norm = accept_norm(norm)
        self.random_start = random_start
        self.restarts = accept_count("restarts", restarts, least=1)
        self.targeted = targeted
        self.loss = resolve_loss(loss, targeted)
        self.bounds = accept_bounds(bounds)
        self.early_stop = early_stop
        self.generator = accept_generator(generator)
        self.before = _before
        self.model = model if isinstance(model, FastAttackModel) else plain(model)
        wide = torch.float64 if has_float64(self.model.device) else torch.float32
        self._fast = self.model.view(decisions="fast", logits_dtype=wide)
        self._full = self.model.view(decisions="fast", logits_dtype=wide, full_precision=True)
        self.exact = self.model.view(decisions="exact", logits_dtype=wide)

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
                search = _Search(self, ball, y.to(torch.int64, copy=True), largest, self._seeds(), found)
                doubtful = search.run(self._fast, torch.arange(len(x), device=x.device))
                if len(doubtful):
                    search.run(self._full, doubtful)
            return found.x

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


@dataclass
class _Search:
    """One attack on one batch: the loop, with the fast network and then, for some samples, in full precision.

    Attributes:
        found: the best candidates of the whole batch, as exact decisions judge them.
    """

    attack: SafePGD
    ball: Ball
    labels: Tensor
    largest_label: int
    seeds: list[int]
    found: Best

    def run(self, network: FastAttackModel, index: Tensor) -> Tensor:
        """Attack the samples at ``index``; returns which of them need an attack in full precision."""
        pool = self._pool(index)
        if self.attack.random_start:  # otherwise the first iterate is the sample itself
            pool, _ = self._look(network, pool, ascend=False)
        for seed in self.seeds:
            if len(pool.index):
                pool.x = self._start(seed, pool)
                pool = self._restart(network, pool)
        return self._settle(pool) if len(pool.index) else pool.index

    def _pool(self, index: Tensor) -> Pool:
        x = self.ball.origin
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        whole = torch.arange(len(x), device=x.device)
        pool = Pool(whole, self.labels, self.ball, self.ball.start(), Best.none(x), broken)
        return pool if len(index) == len(x) else pool.take(index)

    def _start(self, seed: int, pool: Pool) -> Tensor:
        """Iterates to begin with. They are drawn for the whole batch, so a sample's does not depend on who is left."""
        if not self.attack.random_start:
            return pool.ball.start()
        given = self.attack.generator
        generator = torch.Generator(given.device if given else pool.x.device).manual_seed(seed)
        x = self.ball.random_start(generator)
        return x if len(pool.index) == len(x) else x.index_select(0, pool.index)

    def _restart(self, network: FastAttackModel, pool: Pool) -> Pool:
        """All steps from one start; returns the samples that are left."""
        for _ in range(self.attack.steps):
            pool, gradient = self._look(network, pool, ascend=True)
            if len(pool.index) == 0:
                return pool
            pool.ball.step_(pool.x, gradient, self.attack.alpha)
        return self._look(network, pool, ascend=False)[0]

    def _look(self, network: FastAttackModel, pool: Pool, *, ascend: bool) -> tuple[Pool, Tensor]:
        """Offer the iterates as candidates; returns who is left and, to ``ascend``, the gradient of their loss."""
        x = pool.x.to(self.ball.origin.dtype)  # what the model sees: iterates in x's dtype
        leaf, logits, watch = self._forward(network, x, ascend=ascend)
        loss, direction = self._rate(logits, pool.labels, ascend=ascend)
        adversarial, finite = self._adversarial(logits, pool.labels)
        pool.best.offer(leaf.detach(), adversarial, torch.where(finite, loss, -torch.inf))
        pool.broken |= ~finite
        left = self._confirm(pool, leaf.detach(), adversarial) if self.attack.early_stop else None
        pool = pool if left is None else pool.take(left)
        if not ascend or len(pool.index) == 0:
            return pool, pool.x
        if left is not None and 3 * len(left) < 2 * len(x):
            # Forward again for those who are left costs less than backward for everyone.
            leaf, logits, watch = self._forward(network, x.index_select(0, left), ascend=True)
            direction, left = direction.index_select(0, left), None
        (gradient,) = torch.autograd.grad(logits, leaf, direction)
        if self.attack.before is not None:  # it may overflow behind the boundary
            gradient = gradient.nan_to_num(0.0)
        if watch.broken is not None:
            pool.broken |= watch.broken if left is None else watch.broken.index_select(0, left)
        return pool, gradient if left is None else gradient.index_select(0, left)

    def _forward(self, network: FastAttackModel, x: Tensor, *, ascend: bool) -> tuple[Tensor, Tensor, Watch]:
        """Iterates as a leaf of a graph that is gone before a step writes into them, their logits, and the watch."""
        leaf = x.detach().requires_grad_(ascend)
        with torch.set_grad_enabled(ascend), watch_gradients() as watch:
            return leaf, self._logits(network, leaf), watch

    def _confirm(self, pool: Pool, x: Tensor, adversarial: Tensor) -> Tensor | None:
        """Keep what exact decisions confirm; returns the places of the samples that are left, None for all."""
        nominated = adversarial.nonzero().squeeze(1)
        if len(nominated) == 0:
            return None
        part = pool.take(nominated)
        confirmed = self._judge(part, x.index_select(0, nominated))
        left = torch.ones_like(adversarial).index_put_((nominated,), ~confirmed).nonzero().squeeze(1)
        return left if len(left) < len(x) else None

    def _settle(self, pool: Pool) -> Tensor:
        """Judge the best candidates exactly; returns the samples that were broken or wrongly held adversarial."""
        confirmed = self._judge(pool, pool.best.x)
        return pool.index[pool.broken | (pool.best.adversarial & ~confirmed)]

    def _judge(self, pool: Pool, x: Tensor) -> Tensor:
        """Offer candidates as they would be returned, on exact logits; returns which are adversarial."""
        x = pool.ball.finish(x)
        logits = self._logits(self.attack.exact, x)
        adversarial, finite = self._adversarial(logits, pool.labels)
        best = self.found.take(pool.index)
        best.offer(x, adversarial, torch.where(finite, self.attack.loss(logits, pool.labels), -torch.inf))
        self.found.put(pool.index, best)
        return adversarial

    def _rate(self, logits: Tensor, labels: Tensor, *, ascend: bool) -> tuple[Tensor, Tensor]:
        """The loss and, to ``ascend``, the direction at the logits to backpropagate."""
        return self.attack.loss.ascent(logits, labels) if ascend else (self.attack.loss(logits, labels), logits)

    def _logits(self, network: FastAttackModel, x: Tensor) -> Tensor:
        before = self.attack.before
        logits = network(x if before is None else before(x))
        return accept_logits(logits, len(x), self.largest_label)

    def _adversarial(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are adversarial, and which have finite logits; what has not is no success."""
        finite = logits.detach().isfinite().all(1)
        hit = logits.detach().argmax(1) == labels
        return (hit if self.attack.targeted else ~hit) & finite, finite
