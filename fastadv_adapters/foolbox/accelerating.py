"""Attacks of foolbox made fast as a whole: they run on a fast copy of whatever model they are called with."""

import copy
import inspect
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import foolbox
import torch
from foolbox.attacks.base import Attack, Repeated
from foolbox.models import Model
from torch import nn

from ..model import FastAttackModel
from ..modules import has_float64, needs_exact_gradients, reads_decisions
from ..options import FastAttackOptions, check_options
from .models import Caller, around

if TYPE_CHECKING:
    from typing_extensions import Unpack

AttackT = TypeVar("AttackT", bound=Attack)
# Attacks on a cross entropy, which saturates far later in float64. Others may fail on float64 logits, by dtype errors
# of their own or of the attack that they begin with, and the losses of C&W, FMN and EAD do not saturate.
FLOAT64 = ("BaseGradientDescent", "DDNAttack")


def accelerate(attack: AttackT, **options: "Unpack[FastAttackOptions]") -> AttackT:
    """Make an attack that runs on a fast copy of whatever model it is called with.

    ::

        attack = accelerate(foolbox.attacks.L2CarliniWagnerAttack())
        raw, clipped, success = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=None)

    One fast copy is made per ``foolbox.PyTorchModel``, follows its model and is freed with it. Bounds, preprocessing
    and wrappers stay. The attack gets a view of the copy that suits it, unless ``options`` say otherwise:
    ``decisions="exact"`` if it reads decisions off gradient passes (every ``MinimizationAttack``) or compares their
    logits with clean ones (``VirtualAdversarialAttack``); gradients in full precision for ``EADAttack``, which
    amplifies rounding, unless you give ``"exact"`` or ``"fast"``; and float64 logits, in which a cross entropy
    saturates far later, for foolbox's own gradient descent and DDN (not on mps, which has no float64).

    Args:
        attack: a foolbox attack; it stays as it is. (Called on a model that is fast already, the new one leaves that
            with its own options.)
        **options: as of :class:`~fastadv_adapters.FastAttackModel`.

    Returns:
        A new attack, of a class that derives from the given one's, with its settings and methods, fit to be repeated
        or to be the ``init_attack`` of another. Calling it, or its ``run``, raises TypeError for a model that is no
        ``PyTorchModel``, and ValueError for options and a model that is fast already.

    Raises:
        TypeError: not a foolbox attack, or an unknown option.
        ValueError: an unknown value of one, or options for an attack that is accelerated already.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"expected a foolbox attack, got {type(attack).__name__}: make the attack first")
    check_options(options)
    if isinstance(attack, Repeated):
        return type(attack)(accelerate(attack.attack, **options), attack.times)
    kind: Any = type(attack)
    if issubclass(kind, _Accelerated):
        if options:
            raise ValueError(
                f"expected no options for an attack that is accelerated already, got {', '.join(options)}: accelerate "
                f"the attack that it was made of"
            )
        return attack
    namespace = {"__module__": __name__, "_plain": kind, "_options": options}
    fast = type(kind)(f"Fast{kind.__name__}", (_Accelerated, kind), namespace)
    other: AttackT = _made_into(fast, attack)
    return other


class _Accelerated:
    """What an accelerated attack does otherwise than the attack whose class stands behind this one."""

    _plain: type[Attack]
    _options: FastAttackOptions

    def __call__(self, model: Model, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(self._on_fast(model), *args, **kwargs)  # type: ignore[misc]

    def run(self, model: Model, *args: Any, **kwargs: Any) -> Any:
        """Run the attack as another attack runs the one that it begins with."""
        return super().run(self._on_fast(model), *args, **kwargs)  # type: ignore[misc]

    def _on_fast(self, model: Model) -> Model:
        inner = getattr(model, "_model", None)
        if isinstance(inner, Model):
            return around(model, self._on_fast(inner))
        if isinstance(inner, _Swapped):
            return model
        source = inner.fast if isinstance(inner, Caller) else _module_in(model)
        if not isinstance(source, FastAttackModel):
            fast = _copy_of(source, inner, self._options)
            return around(model, _Swapped(fast.view(**suits(self._plain, fast.device, self._options))))
        if self._options:
            raise ValueError(
                f"expected no options for an attack on a model that is fast already, got {', '.join(self._options)}: "
                f"give them to FastAttackModel, or call the attack on a foolbox.PyTorchModel of the plain model"
            )
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(accelerate, **self._options), (_made_into(self._plain, self),)


def suits(kind: type[Attack], device: torch.device, options: FastAttackOptions) -> dict[str, Any]:
    """The options of the view that an attack of this class is strongest on, but for those that were given."""
    chosen: dict[str, Any] = {"decisions": "exact" if reads_decisions(kind) else "auto"}
    if needs_exact_gradients(kind) and "decisions" not in options:
        chosen["full_precision"] = True
    names = {base.__name__ for base in kind.__mro__ if base.__module__.startswith("foolbox.")}
    own = kind.__module__.startswith("foolbox.")  # one of the user's may not be written for float64
    if own and names.intersection(FLOAT64) and has_float64(device):
        chosen["logits_dtype"] = torch.float64
    return {name: value for name, value in chosen.items() if name not in options}


class _Swapped(Caller):
    """Put into a model by an accelerated attack, and left by those inside it."""


_copies: weakref.WeakKeyDictionary[Any, dict[str, FastAttackModel]] = weakref.WeakKeyDictionary()


def _copy_of(source: nn.Module, owner: Any, options: FastAttackOptions) -> FastAttackModel:
    """The one fast copy with these options for ``owner``, the function by which a ``PyTorchModel`` calls its model.

    Copies of a ``PyTorchModel`` share that function, and it refers to the model: the fast copy, which does so too,
    lives as long as the last of them.
    """
    made = _copies.setdefault(owner, {})
    key = repr(sorted(options.items()))
    if key not in made:
        made[key] = FastAttackModel(source, **options)
    return made[key]


def _module_in(model: Model) -> nn.Module:
    """The module that a ``PyTorchModel`` calls, which only the function that it was put into knows."""
    call = getattr(model, "_model", None)
    module = inspect.getclosurevars(call).nonlocals.get("model") if inspect.isfunction(call) else None
    if not isinstance(model, foolbox.PyTorchModel) or not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a foolbox.PyTorchModel, or a wrapper with one in its _model, got {type(model).__name__}: make "
            f"one of the module, or call the attack itself on a FastPyTorchModel"
        )
    return module


def _made_into(kind: Any, attack: Any) -> Any:
    """An attack of this class with the settings of the other one, and lists of its own, which some are fed."""
    made = kind.__new__(kind)
    kept = (list, dict, set)
    vars(made).update({name: copy.copy(v) if isinstance(v, kept) else v for name, v in vars(attack).items()})
    return made
