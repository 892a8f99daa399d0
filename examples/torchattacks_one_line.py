"""The line that changes in a torchattacks script: `FastAttackModel(model)` where the model stood."""

import torch
import torchattacks

from digits import accuracy, grey_digits, trained_net
from fastadv_adapters import FastAttackModel
from fastadv_adapters.torchattacks import accelerate


def main() -> None:
    """Attack a network plainly, fast, and with an attack that exists already."""
    data = grey_digits()
    model = trained_net(data)
    x, y = data.test_images, data.test_labels
    print(f"clean:                    {accuracy(model, x, y):.1%}")

    torch.manual_seed(0)
    attack = torchattacks.PGD(model, eps=0.1, alpha=0.03, steps=10)
    print(f"PGD on the plain model:   {accuracy(model, attack(x, y), y):.1%}")

    torch.manual_seed(0)
    attack = torchattacks.PGD(FastAttackModel(model), eps=0.1, alpha=0.03, steps=10)  # the line that changes
    print(f"PGD on the fast model:    {accuracy(model, attack(x, y), y):.1%}")

    # An attack that exists already, with attacks inside it: each gets the view of one fast model that suits it.
    both = torchattacks.MultiAttack([torchattacks.PGD(model, eps=0.1), torchattacks.APGD(model, eps=0.1)])
    both = accelerate(both)
    print(f"PGD, then APGD, fast:     {accuracy(model, both(x, y), y):.1%}")


if __name__ == "__main__":
    main()
