"""Which attack of a library is asking: a model is called without being told, and the stack of calls knows.

So does a walk over its parts: libraries that explain a model put hooks on its layers.
"""

import sys
import weakref
from functools import lru_cache
from types import FrameType
from typing import Any, Literal

READERS = {
    "torchattacks": ("CW", "DeepFool", "SparseFool", "FAB", "EADL1", "EADEN", "JSMA", "TPGD"),
    "foolbox": ("MinimizationAttack", "VirtualAdversarialAttack"),
    "pyautoattack": ("FABAttack",),
    "autoattack": ("FABAttack",),
    "art": (
        *("CarliniL2Method", "CarliniLInfMethod", "DeepFool", "ElasticNet", "NewtonFool", "SaliencyMapMethod"),
        "BrendelBethgeAttack",
    ),
    "deeprobust": ("CarliniWagner", "CarliniL2", "DeepFool", "LBFGS"),
    "secmlt": ("ModularEvasionAttackMinDistance",),
}
"""Classes of attacks that move or stop by decisions that they read off the logits of gradient passes.

(APGD reads them too, but only to choose among its candidates.) TPGD and VirtualAdversarialAttack compare
such logits with those of a pass without gradient: they start so near to each other that half precision in one of them
hides the difference. Subclasses count, users' own too. No library is imported to find out.
"""
STEEP = {
    "torchattacks": ("EADL1", "EADEN", "JSMA"),
    "foolbox": ("EADAttack",),
    "art": ("ElasticNet", "SaliencyMapMethod"),
}
"""Those among them whose gradients have to be exact too: EAD sets entries back by a threshold on its steps, and so
amplifies small differences; with gradients in half precision its distances are up to 5 % larger. JSMA takes the one
pair of pixels whose gradients' product is largest; with gradients in float16 it broke 3 images in 100 less."""
_FUNCTIONS = "adv_lib.attacks."
_FIXED_BUDGET = ("auto_pgd", "projected_gradient_descent")
"""Attacks of adv-lib are functions, one or two a module: those in all modules but these minimise a perturbation."""
_FUNCTION = "cleverhans.torch.attacks.carlini_wagner_l2"
"""Of cleverhans' functions this module's does."""

EXPLAINERS = ("captum", "shap", "zennit")
"""Libraries that walk over a model to have its layers compute otherwise, and silently do nothing where none is seen."""


_Read = Literal["", "decisions", "gradients"]
_read_by: weakref.WeakKeyDictionary[type, _Read] = weakref.WeakKeyDictionary()  # asked in every pass


def reads_decisions(attack: Any) -> bool:
    """Whether an attack, or a class of them, is one of those in ``READERS``, or derives from one."""
    return _derives_from(attack, READERS)


def needs_exact_gradients(attack: Any) -> bool:
    """Whether an attack, or a class of them, is one of those in ``STEEP``, or derives from one."""
    return _derives_from(attack, STEEP)


def _derives_from(attack: Any, classes: dict[str, tuple[str, ...]]) -> bool:
    return any(
        kind.__name__ in names and kind.__module__.split(".")[0] == library
        for kind in (attack if isinstance(attack, type) else type(attack)).__mro__
        for library, names in classes.items()
    )


def read_by_caller() -> _Read:
    """What of an attack that is running, anywhere up this thread's stack, has to be exact: more than nothing.

    Only the libraries' own frames are looked into. The attack is the ``self`` of one, whichever method it was called
    by; every attack, users' own too, begins in ``__call__`` of its base class, or asks the model in another method of
    it. Or the attack is a function of the library. Attacks inside an attack count with the outermost, which decides by
    what they return.
    """
    found: _Read = ""
    known: Any = None  # methods of one attack call each other: it is looked up once
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        holds = _holds(frame.f_globals.get("__name__", ""))
        if holds == "classes":
            owner = _self_of(frame)
            if owner is not None and owner is not known:
                known, read = owner, _read_by_kind(type(owner))
                if read == "gradients":
                    return read
                found = read or found
        elif holds == "functions":
            found = "decisions"
        frame = frame.f_back
    return found


def _self_of(frame: FrameType) -> Any:
    """The object whose method runs in a frame, None if what runs there is no method."""
    code = frame.f_code
    is_method = code.co_argcount and code.co_varnames[0] == "self"
    return frame.f_locals.get("self") if is_method else None


def _read_by_kind(kind: type) -> _Read:
    read = _read_by.get(kind)
    if read is None:
        read = "gradients" if needs_exact_gradients(kind) else "decisions" if reads_decisions(kind) else ""
        _read_by[kind] = read
    return read


@lru_cache(maxsize=1024)  # a stack has many frames of few modules
def _holds(module: str) -> Literal["", "classes", "functions"]:
    """What a module with this name may hold: classes of attacks, or functions that minimise a perturbation."""
    if module.split(".")[0] in READERS:
        return "classes"
    minimises = module.startswith(_FUNCTIONS) and module.removeprefix(_FUNCTIONS) not in _FIXED_BUDGET
    return "functions" if minimises or module == _FUNCTION else ""


def explainer_above(frame: FrameType | None) -> str:
    """The library of ``EXPLAINERS`` whose walk over a model has come to this frame, of one of its parts; or nothing."""
    while frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module":
        if frame.f_code.co_name == "_named_members":  # it asks for parameters or buffers
            return ""
        frame = frame.f_back
    root = "" if frame is None else str(frame.f_globals.get("__name__", "")).split(".")[0]
    return root if root in EXPLAINERS else ""
