"""A Hugging Face classifier.

Its output is an object with `.logits`. Attack libraries want a module from images to logits, so a small module takes
the logits out; you have one already if you attack such models. One line changes: that module is wrapped in a
`FastAttackModel`. A small ViT is trained here (normally), so that nothing is downloaded; without `transformers` a
stand-in with the same kind of output takes its place.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from common import EPS, DigitsNet, batches, few_digits, verdict
from digits import accuracy
from fastadv_adapters import FastAttackModel


@dataclass
class Output:
    """As the outputs of `transformers`."""

    logits: Tensor


class StandIn(nn.Module):
    """Called and answering as an image classifier of `transformers`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = DigitsNet(width=width)

    def forward(self, pixel_values: Tensor) -> Output:
        """Images to an output object."""
        return Output(logits=self.net(pixel_values))


class Logits(nn.Module):
    """A classifier of `transformers` as attacks want it: from images to logits (N, C)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1]; the normalisation of the Hugging Face image processor belongs here."""
        return cast("Tensor", self.classifier(pixel_values=(x - 0.5) / 0.5).logits)


def classifier(width: int) -> nn.Module:
    """A small ViT for 8 x 8 images; of a checkpoint it is `ViTForImageClassification.from_pretrained(...)`."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        print("with a stand-in for the ViT; for the real one: pip install --constraint constraints.txt transformers")
        return StandIn(width)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_hidden_layers": 3, "num_attention_heads": 4}
    return cast("nn.Module", ViTForImageClassification(
        ViTConfig(hidden_size=4 * width, intermediate_size=8 * width, num_labels=10, **sizes)
    ))  # fmt: skip


def main(*, epochs: int = 6, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train normally, attack and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, model = few_digits(images), Logits(classifier(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for x, y in batches(data, epochs=epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    model.eval()
    fast = FastAttackModel(model)  # <- fast
    for name, target in {"plain": model, "fast": fast}.items():
        attack = torchattacks.PGD(target, eps=EPS, alpha=EPS / 4, steps=10)
        robust = accuracy(model, attack(data.test_images, data.test_labels), data.test_labels)
        print(f"PGD on the {name} model: {robust:.1%} of the digits right, as the plain model sees them")
    return verdict(model, data, name="Hugging Face")


if __name__ == "__main__":
    main()
