"""Why `SafePGD`: a network that is merely more confident looks robust to an ordinary attack, and is not."""

import torch
import torchattacks
from torch import Tensor, nn

from digits import accuracy, grey_digits, trained_net
from fastadv_adapters import FastAttackModel, SafePGD


class Confident(nn.Module):
    """A network's logits times a constant: every decision stays as it was."""

    def __init__(self, model: nn.Module, *, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.factor * torch.as_tensor(self.model(x))


def main() -> None:
    """Attack a network, and the same one made 16 times as confident, with PGD and with SafePGD."""
    data = grey_digits()
    model = trained_net(data)
    x, y = data.test_images, data.test_labels
    for factor in (1.0, 16.0):
        confident = Confident(model, factor=factor).eval()
        fast = FastAttackModel(confident)

        torch.manual_seed(0)
        pgd = torchattacks.PGD(confident, eps=0.15, alpha=0.04, steps=10)(x, y)
        safe = SafePGD(fast, eps=0.15, alpha=0.04, steps=10, generator=torch.Generator().manual_seed(0))(x, y)

        print(f"logits x {factor:2.0f}: PGD leaves {accuracy(confident, pgd, y):.1%}, ", end="")
        print(f"SafePGD {accuracy(confident, safe, y):.1%} of the images classified correctly")
        print(fast.gradient_stats)


if __name__ == "__main__":
    main()
