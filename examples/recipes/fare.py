"""Robust embeddings, as in FARE.

Schlarmann et al. 2024, https://arxiv.org/abs/2402.12336. An encoder is made robust without labels: it is trained so
that its embeddings of attacked images stay near the original encoder's embeddings of the clean images. Two lines
change: `SafePGD` on a `FastAttackModel` of the encoder takes the original embeddings as its targets and the squared
distance from them as its loss. A linear head, trained on the original encoder and never changed, classifies on top of
the encoder before and after: its robust accuracy is reported.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from digits import train
from fastadv_adapters import FastAttackModel, SafePGD


def distance(embeddings: Tensor, original: Tensor) -> Tensor:
    """Squared distance of embeddings (N, D), one value per sample (N,)."""
    return (embeddings - original).square().sum(1)


def main(*, epochs: int = 6, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train an encoder normally, then make it robust; returns clean and robust accuracy after it."""
    torch.manual_seed(0)
    data, classifier = few_digits(images), DigitsNet(width=width)
    train(classifier, data.train_images, data.train_labels, epochs=6, show_progress=False)
    verdict(classifier, data, name="before")
    head, encoder = classifier.head, classifier
    encoder.head = nn.Identity()  # type: ignore[assignment]  # what comes out now is the embedding
    original = copy.deepcopy(encoder)

    fast = FastAttackModel(encoder)  # <- fast
    attack = SafePGD(fast, eps=EPS, alpha=ALPHA, steps=STEPS, loss=distance)  # <- fast
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    for x, _ in batches(data, epochs=epochs):
        with torch.no_grad():
            clean = original(x)
        adversarial = attack(x, clean)  # targets are any tensor with a row per sample
        encoder.eval()  # so batch norm keeps the statistics of the original; the paper's ViT has none
        optimizer.zero_grad()
        F.mse_loss(encoder(adversarial), clean, reduction="none").sum(1).mean().backward()
        optimizer.step()
    return verdict(nn.Sequential(encoder, head), data, name="FARE")


if __name__ == "__main__":
    main()
