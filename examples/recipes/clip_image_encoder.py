"""CLIP: an attack on zero-shot classification.

CLIP is by Radford et al. 2021, https://arxiv.org/abs/2103.00020. The attack is on `encode_image` and the cosine with
embeddings of texts, which are computed once. A small module holds the two and turns images into logits; one line makes
it fast. Wrap that module, not CLIP itself, whose `forward` also wants texts. Nothing is downloaded here: a small image
encoder is trained on digits, and an embedding table stands for the text encoder. For open_clip see the lines in the
docstring of `zero_shot`.
"""

from typing import Protocol, cast

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from common import EPS, DigitsNet, batches, few_digits, verdict
from digits import accuracy
from fastadv_adapters import FastAttackModel


class Encodes(Protocol):
    """What is used of a CLIP model."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Images to embeddings (N, D)."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens to embeddings (N, D)."""


class SmallClip(nn.Module):
    """With the methods of CLIP that are used here; a text is the number of a digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual, self.text, self.logit_scale = DigitsNet(width=width), nn.Embedding(10, 10), 20.0

    def encode_image(self, image: Tensor) -> Tensor:
        """Images to embeddings (N, D)."""
        return cast("Tensor", self.visual(image))

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens to embeddings (N, D)."""
        return cast("Tensor", self.text(text))


class ZeroShot(nn.Module):
    """Images to the scaled cosines with the embeddings of texts, logits (N, texts)."""

    def __init__(self, clip: nn.Module, texts: Tensor, *, scale: float) -> None:
        super().__init__()
        self.clip, self.scale = clip, scale
        self.register_buffer("texts", F.normalize(texts.detach(), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1]; CLIP's normalisation belongs in front of the encoder."""
        image = F.normalize(cast("Encodes", self.clip).encode_image(x), dim=-1)
        return self.scale * image @ cast("Tensor", self.texts).T


def zero_shot(clip: SmallClip) -> ZeroShot:
    """The classifier.

    With open_clip: `clip, _, preprocess = open_clip.create_model_and_transforms(...)`, and as texts
    `clip.encode_text(open_clip.get_tokenizer(...)([f"a photo of a {name}" for name in names]))`. Its `logit_scale` is a
    logarithm: the scale is `clip.logit_scale.exp().item()`. Its `preprocess` ends with the normalisation: leave that
    out, and put it in front of the encoder.
    """
    return ZeroShot(clip, clip.encode_text(torch.arange(10)), scale=clip.logit_scale)


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train a small CLIP normally, attack it and judge; returns clean and robust accuracy."""
    torch.manual_seed(0)
    data, clip = few_digits(images), SmallClip(width)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        optimizer.zero_grad()
        image, text = F.normalize(clip.encode_image(x)), F.normalize(clip.encode_text(torch.arange(10)))
        F.cross_entropy(clip.logit_scale * image @ text.T, y).backward()
        optimizer.step()

    model = zero_shot(clip).eval()
    # Cosines times a scale make CLIP sure: float64 logits keep the cross entropy of the attack from saturating.
    fast = FastAttackModel(model, logits_dtype=torch.float64)  # <- fast
    for name, target in {"plain": model, "fast": fast}.items():
        attack = torchattacks.PGD(target, eps=EPS, alpha=EPS / 4, steps=10)
        robust = accuracy(model, attack(data.test_images, data.test_labels), data.test_labels)
        print(f"PGD on the {name} model: {robust:.1%} of the digits right, as the plain model sees them")
    return verdict(model, data, name="CLIP")


if __name__ == "__main__":
    main()
