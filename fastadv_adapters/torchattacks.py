"""The adapter for torchattacks: any attack takes a ``FastAttackModel`` as its model, or is made fast as a whole.

torchattacks is by Kim 2020, https://arxiv.org/abs/2010.01950.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private by name, see boundary/packing.py

from .attack import LossFunction, LossName, Norm
from .attack import safe_pgd as pgd
from .model import FastAttackModel
from .modules import has_float64, in_eval_mode, needs_exact_gradients, reads_decisions
from .options import FastAttackOptions, check_options, refuse_options

try:
    import torchattacks
    from torchattacks.attack import Attack
except ImportError as error:
    raise ImportError(
        "expected the package torchattacks to be installed, got none: pip install 'fastadv_adapters[torchattacks]'"
    ) from error

if TYPE_CHECKING:
    from typing_extensions import Unpack

AttackT = TypeVar("AttackT", bound=Attack)

# FAB fails on float64 logits, by dtype errors of its own. With the others the same seed would be another attack than on
# the plain model: Jitter draws noise in the dtype of the logits, and black-box attacks compare logits of float32 there.
FLOAT32 = ("FAB", "Jitter", "SPSA", "Square", "OnePixel", "Pixle")


def accelerate(attack: AttackT, **options: "Unpack[FastAttackOptions]") -> AttackT:
    """Swap a fast model into an attack that exists, and into all attacks inside it.

    One fast copy is made per wrapped model. Each attack gets a view of it that suits that attack, unless ``options``
    say otherwise:

    - ``decisions="exact"`` for those that read decisions off gradient passes (C&W, DeepFool, SparseFool, FAB, EAD,
      JSMA) or compare their logits with clean ones (TPGD);
    - gradients in full precision for EAD and JSMA, which amplify rounding, unless you give ``"exact"`` or ``"fast"``;
    - float64 logits, in which a cross entropy saturates far later. These attacks keep float32 logits: FAB, which fails
      on others; LGV; Jitter, which would draw other noise; the black-box attacks SPSA, Square, OnePixel and Pixle;
      attack classes of your own; and all attacks on mps, which has no float64.

    The black-box attacks decide by the plain model's classes; on a processor the logits that they get may differ from
    the plain model's in the last digits. With ``decisions="exact"`` they return the very images that they return on the
    plain model.

    LGV still trains a copy of the plain model; the models that it has collected are attacked through fast copies.

    Args:
        attack: a torchattacks attack on a plain model. (One on a fast model is left as it is, with the options of that
            model: make it on the plain one to have each attack inside get what suits it.)
        **options: as of :class:`~fastadv_adapters.FastAttackModel`.

    Returns:
        The same attack object; its ``model`` is the fast one, with ``summary()`` and ``gradient_stats``.

    Raises:
        TypeError: not a torchattacks attack, or an unknown option.
        ValueError: an option of unknown value; or options for an attack on a model that is fast already.
        RuntimeError: the attack is set to training mode.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"expected a torchattacks attack, got {type(attack).__name__}: make the attack first")
    copies: dict[int, FastAttackModel] = {}
    swaps: list[tuple[Attack, str, Any]] = []  # made at the end, so that a refusal leaves the attack as it was
    for part in attacks_in(attack):
        if part._model_training:
            raise RuntimeError(
                f"expected an attack on the model in eval mode, got {part.attack} set to training mode by "
                f"set_model_training_mode(True). A fast model computes the eval-mode function: set it back first"
            )
        if isinstance(part, torchattacks.LGV):
            swaps.append((part, "attack_class", _of_fast_models(part.attack_class, options)))
        elif isinstance(part.model, FastAttackModel):
            refuse_options(options)
        else:
            if id(part.model) not in copies:
                copies[id(part.model)] = FastAttackModel(part.model, **options)
            swaps.append((part, "model", view_for(part, copies[id(part.model)], options)))
    for part, name, value in swaps:
        setattr(part, name, value)
    return attack


def attacks_in(attack: Attack) -> Iterator[Attack]:
    """The attack and all attacks inside it, each once; also those that were put into a MultiAttack's list later."""
    seen: set[int] = set()
    waiting = [attack]
    while waiting:
        part = waiting.pop(0)
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            listed = getattr(part, "attacks", ())  # which torchattacks looks through when it is set alone
            later = listed if isinstance(listed, (list, tuple)) else ()
            waiting += [*part._attacks.values(), *(one for one in later if isinstance(one, Attack))]


def view_for(attack: Attack, fast: FastAttackModel, options: FastAttackOptions) -> FastAttackModel:
    """The view of ``fast`` that this one attack is strongest on, by the class of torchattacks that it derives from."""
    names = {kind.__name__ for kind in type(attack).__mro__ if kind.__module__.startswith("torchattacks.")}
    suits: dict[str, Any] = {"decisions": "exact" if reads_decisions(attack) else "auto"}
    if needs_exact_gradients(attack) and "decisions" not in options:
        suits["full_precision"] = True
    own = type(attack).__module__.startswith("torchattacks.")
    if own and not names.intersection(FLOAT32) and has_float64(fast.device):
        suits["logits_dtype"] = torch.float64
    return fast.view(**{name: value for name, value in suits.items() if name not in options})


@dataclass(frozen=True, eq=False)
class _OnFastEnsemble:
    """What LGV makes its inner attack with, on fast copies of the models that it has collected.

    Attributes:
        attack_class: what LGV made it with before.
        options: of the fast copies.
    """

    attack_class: Callable[..., Any]
    options: FastAttackOptions

    @property
    def __name__(self) -> str:
        return str(getattr(self.attack_class, "__name__", type(self.attack_class).__name__))

    def __call__(self, model: nn.Module, **kwargs: Any) -> Any:
        """The attack on the ensemble, whose models are replaced."""
        model.models = nn.ModuleList(FastAttackModel(m, **self.options) for m in model.models)  # type: ignore[union-attr]
        return self.attack_class(model=model, **kwargs)


def _of_fast_models(attack_class: Callable[..., Any], options: FastAttackOptions) -> _OnFastEnsemble:
    if isinstance(attack_class, _OnFastEnsemble):
        refuse_options(options)
        return attack_class
    check_options(options)  # not only once the models have been trained
    return _OnFastEnsemble(attack_class, options)


class SafePGD(Attack):  # type: ignore[misc]
    """:class:`fastadv_adapters.SafePGD` as a torchattacks attack, with its targeted modes and normalisation.

    Distance measure: Linf, L2 or L1.

    Args:
        model: a plain module or a :class:`~fastadv_adapters.FastAttackModel`.
        eps: budget, in units of the input (8/255, say).
        alpha: size of every step; None for steps that get shorter, see :class:`fastadv_adapters.SafePGD`.
        steps: number of steps.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        random_start: start at a random point of the budget.
        restarts: how often to start, keeping the best.
        loss: ``"auto"``, ``"ce"``, ``"dlr"``, ``"margin"`` or a callable, see :class:`fastadv_adapters.SafePGD`.
        early_stop: drop samples that are adversarial already.
        generator: source of randomness.
        classes: whether labels are classes; None: integers of shape (N,) are, see :class:`fastadv_adapters.SafePGD`.

    Shape:
        - images: (N, C, H, W), floating, in [0, 1] (or normalised, after ``set_normalization_used``).
        - labels: (N,), integers in [0, number of classes). In the default mode also a tensor or a tree of tensors
          with N rows each, or None, for a callable loss; they are moved to the model's device.
        - output: as images.

    Examples::
        >>> attack = fastadv_adapters.torchattacks.SafePGD(fast, eps=8/255, steps=10)
        >>> adv_images = attack(images, labels)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        *,
        norm: Norm = "linf",
        random_start: bool = True,
        restarts: int = 1,
        loss: LossName | LossFunction = "auto",
        early_stop: bool = False,
        generator: torch.Generator | None = None,
        classes: bool | None = None,
    ) -> None:
        super().__init__("SafePGD", model)
        self.supported_mode = ["default", "targeted"]
        self.eps, self.alpha, self.steps, self.norm = eps, alpha, steps, norm
        self.random_start, self.restarts, self.loss = random_start, restarts, loss
        self.early_stop, self.generator, self.classes = early_stop, generator, classes
        self._attack_on(targeted=False)  # a wrong setting is an error here, not at the first call

    def __call__(self, inputs: Tensor, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Attack a batch, and leave the mode of each part of the model, and the normalisation, as they were.

        torchattacks sets whole models to a mode, and after an error it would take normalised images for raw ones.
        """
        applied = self._normalization_applied
        try:
            with self._model_in_eval_mode():
                found: Tensor = super().__call__(inputs, labels, *args, **kwargs)
        except BaseException:
            self.__dict__["_normalization_applied"] = applied  # past torchattacks' __setattr__, as in _attack_on
            raise
        return found

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """As in torchattacks; the mode of each part of the model is left as it was."""
        with self._model_in_eval_mode():
            return super().save(*args, **kwargs)

    def _model_in_eval_mode(self) -> AbstractContextManager[None]:
        """A fast model always is."""
        return nullcontext() if isinstance(self.model, FastAttackModel) else in_eval_mode(self.model)

    def forward(self, images: Tensor, labels: Any = None) -> Tensor:
        """Attack a batch.

        Labels are classes to be reached in the targeted(label) mode; in the others true ones, or the loss's targets.
        """
        images = images.detach().to(self.device)
        if self._normalization_applied is False:  # another attack around this one may have undone it
            images = self._without_rounding(images, images.dtype)
        labels = pytree.tree_map_only(Tensor, lambda t: t.detach().to(self.device), labels)
        if self.targeted:
            labels = self.get_target_label(images, labels)
        return self._attack_on(targeted=self.targeted)(images, labels)

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """Images of normalised ones, in [0, 1] if but for rounding they are."""
        return self._without_rounding(super().inverse_normalize(inputs), inputs.dtype)

    def _without_rounding(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images with what lies a few roundings outside of [0, 1] put back; what lies further out stays.

        Values were rounded to ``dtype``, and by the mean and the deviation to theirs.
        """
        dtypes = (dtype, *(t.dtype for t in self.normalization_used.values()))
        slack = 8 * max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)
        inside = images.clamp(0, 1)
        return torch.where((images - inside).abs() <= slack, inside, images)

    def set_model_training_mode(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: the attack runs on the model's eval-mode function."""
        if any(args) or any(kwargs.values()):
            raise RuntimeError(
                "expected SafePGD on the model in eval mode, got set_model_training_mode(True): it attacks the "
                "eval-mode function, whichever mode the model is in. Use torchattacks.PGD on the plain model instead"
            )

    def _attack_on(self, *, targeted: bool) -> pgd.SafePGD:
        """The attack itself with the present settings; a plain model is wrapped once."""
        # Past torchattacks' __setattr__, which compares every value with all that it has seen before.
        model, fast = self.__dict__.get("_wrapped", (None, None))
        if model is not self.model:
            fast = self.model if isinstance(self.model, FastAttackModel) else pgd.plain(self.model)
            self.__dict__["_wrapped"] = self.model, fast
        attack = pgd.SafePGD(
            fast,
            eps=self.eps,
            alpha=self.alpha,
            steps=self.steps,
            norm=self.norm,
            random_start=self.random_start,
            restarts=self.restarts,
            targeted=targeted,
            loss=self.loss,
            early_stop=self.early_stop,
            generator=self.generator,
            classes=self.classes,
        )
        if self._normalization_applied is False:
            attack.before = self.normalize
        return attack
