"""The line that changes in a foolbox script: `FastPyTorchModel` where `foolbox.PyTorchModel` stood."""

import foolbox
import torch

from digits import accuracy, grey_digits, trained_net
from fastadv_adapters.foolbox import FastPyTorchModel, SafeLinfPGD


def main() -> None:
    """Attack a network plainly, fast, with the safe attack, and with one that looks for the smallest perturbation."""
    data = grey_digits()
    model = trained_net(data)
    x, y = data.test_images, data.test_labels
    print(f"clean:                       {accuracy(model, x, y):.1%}")

    attack = foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25)
    torch.manual_seed(0)  # the same random start each time
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, clipped, success = attack(fmodel, x, y, epsilons=0.1)
    print(f"LinfPGD on the plain model:  {(~success).float().mean().item():.1%}")

    fmodel = FastPyTorchModel(model, bounds=(0, 1))  # the line that changes
    torch.manual_seed(0)
    _, clipped, success = attack(fmodel, x, y, epsilons=0.1)
    print(f"LinfPGD on the fast model:   {(~success).float().mean().item():.1%}")

    # The same attack with a loss that does not saturate.
    torch.manual_seed(0)
    _, clipped, success = SafeLinfPGD(steps=10, rel_stepsize=0.25)(fmodel, x, y, epsilons=0.1)
    print(f"SafeLinfPGD, fast:           {(~success).float().mean().item():.1%}")

    # Attacks that look for the smallest perturbation read decisions from forwards with gradient: they get exact ones.
    x, y = x[:100], y[:100]
    _, clipped, success = foolbox.attacks.L2DeepFoolAttack()(fmodel, x, y, epsilons=None)
    print(f"L2DeepFool, median distance: {(clipped - x).flatten(1).norm(dim=1).median().item():.3f}")


if __name__ == "__main__":
    main()
