"""A Lightning module that owns its attack.

The attack is made once, in `__init__`, of a `FastAttackModel` of the network, and used in `training_step`. Neither adds
anything to `state_dict()` or `parameters()`, so checkpoints and optimizers stay as they were. The module's mode does
not matter: the attack always sees the network as it is in eval mode. Wrap the network, not the whole module: metrics in
the module change in each step, and a fast model of it would be built anew each time.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from common import ALPHA, EPS, STEPS, DigitsNet, few_digits, needs, verdict
from fastadv_adapters import FastAttackModel, SafePGD

with needs("pip install --constraint constraints.txt lightning"):
    import lightning


class Robust(lightning.LightningModule):
    """A network that is trained on what the attack makes of the images."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.net = DigitsNet(width=width)
        # Many inner maximisers want the cross entropy itself; the default loss is for attacks that evaluate.
        self.attack = SafePGD(FastAttackModel(self.net), eps=EPS, alpha=ALPHA, steps=STEPS, loss="ce")  # <- fast

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return cast("Tensor", self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss on attacked images."""
        x, y = batch
        return F.cross_entropy(self(self.attack(x, y)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the network's weights; the fast model has none."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, module = few_digits(images), Robust(width=width)
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return verdict(module, data, name="Lightning")


if __name__ == "__main__":
    main()
