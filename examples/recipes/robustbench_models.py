"""RobustBench: its models, and its `benchmark`.

Croce et al. 2021, https://arxiv.org/abs/2010.09670. A model from its `load_model` is a module as any other: one line
makes it fast. Its `benchmark` takes the fast model too. It makes its AutoAttack inside, where `accelerate` cannot be
used. So give it a view with `decisions="exact"`. Then APGD keeps only images that the plain model gets wrong, and
`benchmark`, which judges by the model that it is given, sees the plain model's outputs. It downloads the data.
RobustBench and its AutoAttack are installed from their repositories, by the line in `INSTALL`.
"""

from common import needs
from digits import accuracy
from fastadv_adapters import FastAttackModel, SafePGD

INSTALL = (
    "pip install --constraint constraints.txt git+https://github.com/RobustBench/robustbench "
    "git+https://github.com/fra31/auto-attack"
)
with needs(INSTALL):
    from robustbench.data import load_cifar10
    from robustbench.eval import benchmark
    from robustbench.utils import load_model

EPS = 8 / 255


def main(*, name: str = "Carmon2019Unlabeled", images: int = 50) -> tuple[float, float]:
    """Judge a model in three ways; returns clean accuracy and what SafePGD leaves of it.

    Args:
        name: of a model for CIFAR-10 in L-infinity on the leaderboard; downloaded, as are the images.
        images: of the test set, for all three ways.
    """
    model = load_model(model_name=name, dataset="cifar10", threat_model="Linf").eval()
    x, y = load_cifar10(n_examples=images)
    fast = FastAttackModel(model)  # <- fast

    # A quick look: one strong attack. It may leave a few more images right than AutoAttack does.
    adversarial = SafePGD(fast, eps=EPS, steps=20, early_stop=True)(x, y)
    clean, robust = accuracy(model, x, y), accuracy(model, adversarial, y)
    print(f"SafePGD on the fast model: {clean:.1%} clean, {robust:.1%} robust, as the plain model sees them")

    # The leaderboard's own: AutoAttack on the plain model, then on the fast one.
    same = {"n_examples": images, "dataset": "cifar10", "threat_model": "Linf", "eps": EPS}
    exact = fast.view(decisions="exact")  # <- fast
    for what, given in {"the plain model": model, "the fast model": exact}.items():
        shares = benchmark(given, **same)
        print("benchmark of {}: {:.1%} clean, {:.1%} robust".format(what, *shares))
    return clean, robust


if __name__ == "__main__":
    main()
