"""All attacks of foolbox, with budgets that a small network and half an hour allow."""

from typing import Any

from benchmarks.matrix.cases import Case, Norm, Row

TARGETED_BUDGET = 2.0
NOISE_BUDGET = 3.0
"""Noise needs more than a gradient."""


def _both(case: Case) -> tuple[Case, ...]:
    """The case, and the same with targets and a larger budget."""
    budget = None if case.budget is None else TARGETED_BUDGET * case.budget
    return case, case.but(budget=budget, targeted="criterion", label=f"{case.label} targeted".strip())


def _gradient(norm: Norm, /, **settings: Any) -> Case:
    return Case("gradient", norm, settings, budget=1.0)


def _least(norm: Norm, /, **settings: Any) -> Case:
    return Case("minimum-norm", norm, settings)


def _noise(norm: Norm, /, **settings: Any) -> Case:
    return Case("black-box", norm, settings, budget=NOISE_BUDGET)


def _search(norm: Norm, /, **settings: Any) -> Case:
    return Case("black-box", norm, settings)


def _row(name: str, *cases: Case, note: str = "") -> Row:
    return Row("foolbox", name, cases, note)


def _stepping(kind: str) -> tuple[Row, ...]:
    """A family of attacks with a fixed budget, in the three norms."""
    norms: tuple[Norm, ...] = ("l1", "l2", "linf")
    return tuple(
        _row(f"{norm.capitalize()}{kind}", *_both(_gradient(norm, steps=30, rel_stepsize=0.1))) for norm in norms
    )


BRENDEL = {"steps": 50, "binary_search_steps": 10}
HOP = {"steps": 5, "initial_gradient_eval_steps": 20, "max_gradient_eval_steps": 50}
STARTED = "It is given starting points, training images of another class."

ROWS = (
    _row("L2ContrastReductionAttack", _noise("l2"), note="It asks no model."),
    _row("VirtualAdversarialAttack", _gradient("l2", steps=5, xi=0.1)),
    _row("DDNAttack", *_both(_least("l2", steps=100))),
    *_stepping("ProjectedGradientDescentAttack"),
    *_stepping("AdamProjectedGradientDescentAttack"),
    *_stepping("BasicIterativeAttack"),
    *_stepping("AdamBasicIterativeAttack"),
    *_stepping("MomentumIterativeFastGradientMethod"),
    _row("L1FastGradientAttack", _gradient("l1")),
    _row("L2FastGradientAttack", _gradient("l2")),
    _row("LinfFastGradientAttack", _gradient("linf")),
    _row("L2AdditiveGaussianNoiseAttack", _noise("l2"), note="It asks no model."),
    _row("L2AdditiveUniformNoiseAttack", _noise("l2"), note="It asks no model."),
    _row("L2ClippingAwareAdditiveGaussianNoiseAttack", _noise("l2"), note="It asks no model."),
    _row("L2ClippingAwareAdditiveUniformNoiseAttack", _noise("l2"), note="It asks no model."),
    _row("LinfAdditiveUniformNoiseAttack", _noise("linf"), note="It asks no model."),
    _row("L2RepeatedAdditiveGaussianNoiseAttack", *_both(_noise("l2", repeats=50))),
    _row("L2RepeatedAdditiveUniformNoiseAttack", *_both(_noise("l2", repeats=50))),
    _row("L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack", *_both(_noise("l2", repeats=50))),
    _row("L2ClippingAwareRepeatedAdditiveUniformNoiseAttack", *_both(_noise("l2", repeats=50))),
    _row("LinfRepeatedAdditiveUniformNoiseAttack", *_both(_noise("linf", repeats=50))),
    _row("SparseL1DescentAttack", *_both(_gradient("l1", steps=30, rel_stepsize=0.1, quantile=0.95))),
    _row("InversionAttack", _search("l2"), note="It asks no model."),
    _row("BinarySearchContrastReductionAttack", *_both(_search("l2"))),
    _row("LinearSearchContrastReductionAttack", *_both(_search("l2", steps=100))),
    _row(
        "L2CarliniWagnerAttack", *_both(_least("l2", binary_search_steps=6, steps=50, stepsize=0.03, abort_early=False))
    ),
    _row("NewtonFoolAttack", _least("l2", steps=50)),
    _row("EADAttack", *_both(_least("l1", binary_search_steps=6, steps=50, initial_stepsize=0.05, abort_early=False))),
    _row("GaussianBlurAttack", *_both(_search("l2", steps=100))),
    _row("SpatialAttack", *_both(_search("l2"))),
    _row("L2DeepFoolAttack", _least("l2", steps=50)),
    _row("LinfDeepFoolAttack", _least("linf", steps=50)),
    _row("SaltAndPepperNoiseAttack", *_both(_search("l2", steps=200))),
    _row("LinearSearchBlendedUniformNoiseAttack", *_both(_search("l2", steps=100, directions=50))),
    _row(
        "BinarizationRefinementAttack",
        *_both(_search("l2").but(start=True, model="binarised")),
        note=f"{STARTED} The network is behind a threshold, which is what the attack is made for.",
    ),
    _row("DatasetAttack", *_both(_search("l2")), note="It is fed the images themselves."),
    _row("BoundaryAttack", *_both(_search("l2", steps=300).but(start=True)), note=STARTED),
    _row("HopSkipJumpAttack", *_both(_search("l2", **HOP).but(start=True)), note=STARTED),
    _row("L0BrendelBethgeAttack", *_both(_least("l0", **BRENDEL).but(start=True)), note=STARTED),
    _row("L1BrendelBethgeAttack", *_both(_least("l1", **BRENDEL).but(start=True)), note=STARTED),
    _row("L2BrendelBethgeAttack", *_both(_least("l2", **BRENDEL).but(start=True)), note=STARTED),
    _row("LinfinityBrendelBethgeAttack", *_both(_least("linf", **BRENDEL).but(start=True)), note=STARTED),
    _row("L0FMNAttack", *_both(_least("l0", steps=100))),
    _row("L1FMNAttack", *_both(_least("l1", steps=100))),
    _row("L2FMNAttack", *_both(_least("l2", steps=100))),
    _row("LInfFMNAttack", *_both(_least("linf", steps=100))),
    _row(
        "GenAttack",
        Case("black-box", "linf", {"steps": 30}, budget=TARGETED_BUDGET, targeted="criterion", label="targeted"),
        note="It has a targeted mode alone.",
    ),
    _row("PointwiseAttack", *_both(_search("l0", l2_binary_search=False).but(start=True)), note=STARTED),
)
