"""Networks that several files attack."""

import pytest
import torch
from torch import nn

from digits import Digits, DigitsNet, grey_digits, train
from fastadv_adapters import FastAttackModel, SafePGD


@pytest.fixture(scope="session")
def data() -> Digits:
    """The digits."""
    return grey_digits()


@pytest.fixture(scope="session")
def robust(data: Digits) -> nn.Module:
    """A small network, trained adversarially for seconds."""
    torch.manual_seed(0)
    net = DigitsNet(width=8)
    generator = torch.Generator().manual_seed(0)
    attack = SafePGD(FastAttackModel(net, dtype=torch.float32), eps=0.15, steps=2, loss="ce", generator=generator)
    train(net, data.train_images, data.train_labels, attack=attack, epochs=5, batch_size=128, show_progress=False)
    return net
