"""All attacks of torchattacks, with budgets that a small network and half an hour allow."""

from typing import Any

from benchmarks.matrix.cases import Case, Eps, Norm, Row, Targeted, scaled

EPS = Eps()
TARGETED_BUDGET = 2.0
"""Reaching one class takes more than leaving one."""


def _both(case: Case, targeted: Targeted = "label") -> tuple[Case, ...]:
    """The case, and the same with targets and a larger budget."""
    aimed = scaled(case, TARGETED_BUDGET).but(targeted=targeted, label=f"{case.label} targeted".strip())
    return case, aimed


def _gradient(norm: Norm = "linf", /, **settings: Any) -> Case:
    return Case("gradient", norm, settings, budget=1.0)


def _least(norm: Norm, /, **settings: Any) -> Case:
    return Case("minimum-norm", norm, settings)


def _row(name: str, *cases: Case, note: str = "") -> Row:
    return Row("torchattacks", name, cases, note)


STEPPING = {"eps": EPS, "alpha": Eps(0.1), "steps": 30}
MOMENTUM = {"eps": EPS, "alpha": Eps(0.2), "steps": 10}
"""More steps make these weaker: the momentum carries them on."""
ELASTIC = {"initial_const": 0.01, "binary_search_steps": 5, "max_iterations": 40, "abort_early": False}
PATCHES = {"max_epsilon": EPS, "num_iter_set": 20}
SPSA = Case("black-box", "linf", {"eps": EPS, "lr": Eps(0.2), "nb_iter": 10, "nb_sample": 32}, budget=1.0)
SQUARE = Case("black-box", "linf", {"eps": EPS, "n_queries": 200}, budget=1.0)
FAB = Case("gradient", "linf", {"eps": EPS, "steps": 20}, budget=1.0)
AUTO = Case("gradient", "linf", {"eps": EPS, "seed": 0, "n_queries": 500}, budget=1.0)

ROWS = (
    _row("VANILA", Case("black-box", "linf"), note="It changes nothing: a check of the clean accuracy."),
    _row("GN", Case("black-box", "linf", {"std": 0.3}), note="It adds noise and asks no model."),
    _row("FGSM", *_both(_gradient(eps=EPS))),
    _row("BIM", *_both(_gradient(**STEPPING))),
    _row("RFGSM", *_both(_gradient(**STEPPING))),
    _row("PGD", *_both(_gradient(**STEPPING))),
    _row("EOTPGD", *_both(_gradient(**STEPPING))),
    _row("FFGSM", *_both(_gradient(eps=EPS, alpha=Eps(1.25)))),
    _row("TPGD", _gradient(**STEPPING)),
    _row("MIFGSM", *_both(_gradient(**MOMENTUM))),
    _row("UPGD", *_both(_gradient(**MOMENTUM))),
    _row(
        "APGD",
        _gradient(eps=EPS, steps=20),
        _gradient(eps=EPS, steps=20, loss="dlr").but(label="DLR"),
        _gradient("l2", eps=EPS, steps=20, norm="L2").but(label="L2"),
    ),
    _row("APGDT", _gradient(eps=EPS), _gradient("l2", eps=EPS, norm="L2").but(label="L2")),
    _row("DIFGSM", *_both(_gradient(**STEPPING, resize_rate=0.5))),
    _row("TIFGSM", *_both(_gradient(**STEPPING, resize_rate=0.5, len_kernel=3))),
    _row("Jitter", *_both(_gradient(**STEPPING))),
    _row("NIFGSM", *_both(_gradient(**MOMENTUM))),
    _row("PGDRS", *_both(_gradient(**STEPPING, noise_sd=0.1))),
    _row("SINIFGSM", *_both(_gradient(**MOMENTUM))),
    _row("VMIFGSM", *_both(_gradient(**MOMENTUM))),
    _row("VNIFGSM", *_both(_gradient(**MOMENTUM))),
    _row("SPSA", *_both(SPSA)),
    _row("JSMA", *_both(Case("gradient", "l0", {"gamma": 0.1}))),
    _row("EADL1", *_both(_least("l1", **ELASTIC).but(full_precision=True))),
    _row("EADEN", *_both(_least("l1", **ELASTIC).but(full_precision=True))),
    _row("PIFGSM", _gradient(**PATCHES)),
    _row("PIFGSMPP", *_both(_gradient(**PATCHES))),
    _row("CW", *_both(_least("l2", c=5, steps=100, lr=0.02))),
    _row("PGDL2", *_both(_gradient("l2", **STEPPING))),
    _row("DeepFool", _least("l2", steps=20)),
    _row("PGDRSL2", *_both(_gradient("l2", **STEPPING, noise_sd=0.1))),
    _row("SparseFool", _least("l0", steps=3)),
    _row("OnePixel", *_both(Case("black-box", "l0", {"pixels": 2, "steps": 5, "popsize": 20}))),
    _row("Pixle", *_both(Case("black-box", "l0", {"restarts": 5, "max_iterations": 5}))),
    _row(
        "FAB",
        *_both(FAB, "function"),
        FAB.but(norm="l2", settings={"norm": "L2"}, label="L2"),
        FAB.but(norm="l1", settings={"norm": "L1"}, label="L1"),
        note="Its targeted mode reads the true labels, and asks a function for the targets.",
    ),
    _row(
        "AutoAttack",
        AUTO,
        AUTO.but(norm="l2", settings={"norm": "L2"}, label="L2"),
        note="Here with 500 queries of Square. APGD and APGDT get float64 logits, FAB exact decisions, Square neither.",
    ),
    _row("Square", *_both(SQUARE), SQUARE.but(norm="l2", settings={"norm": "L2"}, label="L2")),
    _row("MultiAttack", _gradient(**STEPPING), note="Here of PGD, MIFGSM and APGD."),
    _row(
        "LGV",
        *_both(_gradient(**STEPPING), "least-likely"),
        note="It trains copies of the plain model; the copies are attacked through fast ones.",
    ),
)
