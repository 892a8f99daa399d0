"""The adapter for AutoAttack itself: the reference's attacks on a fast copy, its verdicts by the plain model.

AutoAttack is by Croce and Hein 2020, https://arxiv.org/abs/2003.01690; on the registry it is ``pyautoattack``. Nothing
of it is imported here: what counts is where an adversary keeps its attacks, which is the same in the package
``autoattack`` that it stems from.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .model import FastAttackModel
from .modules import has_float64
from .options import FastAttackOptions, refuse_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

AdversaryT = TypeVar("AdversaryT")

ATTACKS = {"apgd": "model", "apgd_targeted": "model", "fab": "predict", "square": "predict"}
"""Where an adversary keeps its attacks -> where an attack keeps its model."""


def accelerate(adversary: AdversaryT, **options: "Unpack[FastAttackOptions]") -> AdversaryT:
    """Swap a fast model into the attacks of an AutoAttack that exists.

    ::

        adversary = accelerate(AutoAttack(model, norm="Linf", eps=8 / 255, version="standard"))
        x_adv, y_adv = adversary.run_standard_evaluation(x, y, batch_size=250)

    One fast copy is made. Each attack gets a view of it that suits it, unless ``options`` say otherwise. APGD, targeted
    or not: the fast network, and float64 logits, in which a cross entropy saturates far later (not on mps, which has no
    float64). FAB: ``decisions="exact"``, because it reads decisions off gradient passes, and float32 logits, because it
    fails on others. Square: full precision, because it takes no gradient.

    ``adversary.model`` stays the plain model. With it AutoAttack checks the defence, computes the clean accuracy and
    judges every adversarial image, so its log, its robust accuracy and its state file say what holds for the model
    itself.

    Args:
        adversary: an ``AutoAttack`` of ``pyautoattack`` or ``autoattack`` on a plain PyTorch model in eval mode, of any
            version, norm and settings, which it keeps. (One on a fast model is left as it is, with the options of that
            model: make it on the plain one to have each attack get what suits it.)
        **options: as of :class:`~fastadv_adapters.FastAttackModel`.

    Returns:
        The same object; the ``model`` of its ``apgd`` is the fast one, with ``summary()`` and ``gradient_stats``.

    Raises:
        TypeError: not an AutoAttack, one whose model is no ``nn.Module``, or an unknown option.
        ValueError: options for an AutoAttack on a model that is fast already.
        RuntimeError: the model is in training mode.
    """
    found = {name: getattr(adversary, name, None) for name in ATTACKS}
    if not all(hasattr(attack, ATTACKS[name]) for name, attack in found.items()):
        raise TypeError(
            f"expected an AutoAttack of pyautoattack or autoattack, got {type(adversary).__name__}: make it first, on "
            f"the plain model (for that of torchattacks there is fastadv_adapters.torchattacks)"
        )
    copies: dict[int, FastAttackModel] = {}
    swaps: list[tuple[Any, str, FastAttackModel]] = []  # made at the end, so that a refusal leaves all as it was
    for name, attack in found.items():
        model = getattr(attack, ATTACKS[name])
        if isinstance(model, FastAttackModel):
            refuse_options(options)
            continue
        if getattr(model, "training", False):
            raise RuntimeError(
                f"expected an attack on the model in eval mode, got {type(adversary).__name__} on one in training "
                f"mode. A fast model computes the eval-mode function, and AutoAttack judges by the mode that it finds: "
                f"call model.eval() first"
            )
        if id(model) not in copies:
            copies[id(model)] = FastAttackModel(model, **options)
        swaps.append((attack, ATTACKS[name], view_for(name, copies[id(model)], options)))
    for attack, place, view in swaps:
        setattr(attack, place, view)
    return adversary


def view_for(name: str, fast: FastAttackModel, options: FastAttackOptions) -> FastAttackModel:
    """The view of ``fast`` that this one attack is strongest on."""
    suits: dict[str, Any] = {"decisions": "exact" if name == "fab" else "auto"}
    if name.startswith("apgd") and has_float64(fast.device):
        suits["logits_dtype"] = torch.float64
    return fast.view(**{option: value for option, value in suits.items() if option not in options})
