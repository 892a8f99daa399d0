"""A moving average of the weights (EMA).

Three kinds of average are shown: PyTorch's AveragedModel, timm's ModelEmaV3, and one by hand through `.data`. The model
is trained adversarially, and its average is attacked and used in the end. One line makes a `FastAttackModel` of the
average, as of any model. PyTorch's and timm's averages are written in place, and the fast model follows by itself. One
that is written through `.data` leaves no trace in PyTorch, so on a GPU it needs `fast.update()`.
"""

import copy
from typing import Any

import torch
import torchattacks
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import ALPHA, EPS, STEPS, DigitsNet, batches, few_digits, verdict
from digits import accuracy
from fastadv_adapters import FastAttackModel, SafePGD

DECAY = 0.9


def by_hand(average: nn.Module, model: nn.Module) -> None:
    """Move an average towards a model, as much published code does it: nothing records these writes."""
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mean.data.mul_(DECAY).add_(new.data, alpha=1 - DECAY) if mean.is_floating_point() else mean.data.copy_(new.data)


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train, average in every way and judge; returns clean and robust accuracy of PyTorch's average."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    # use_buffers: average the running statistics of batch norm too; else they are copied from the model.
    averages: dict[str, Any] = {
        "AveragedModel": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    }
    try:
        from timm.utils import ModelEmaV3
    except Exception as error:  # it imports torchvision, which may not fit PyTorch: another kind of error
        install = "pip install --constraint constraints.txt timm"
        print(f"without timm's ModelEmaV3, since importing it raised {type(error).__name__}: {install}")
    else:
        averages["ModelEmaV3"] = ModelEmaV3(model, decay=DECAY)
    hand = copy.deepcopy(model)
    fasts = {name: FastAttackModel(average) for name, average in averages.items()}  # <- fast
    fasts["by hand"] = FastAttackModel(hand)  # <- fast

    attack = torchattacks.PGD(FastAttackModel(model), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        adversarial = attack(x, y)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), y).backward()
        optimizer.step()
        averages["AveragedModel"].update_parameters(model)
        if "ModelEmaV3" in averages:
            averages["ModelEmaV3"].update(model)
        by_hand(hand, model)
        fasts["by hand"].update()  # <- fast: after writes through .data

    for name, fast in fasts.items():
        adversarial = SafePGD(fast, eps=EPS, steps=10)(data.test_images, data.test_labels)
        robust = accuracy(fast.wrapped.eval(), adversarial, data.test_labels)
        print(f"{name}: {robust:.1%} right by the plain average, after an attack on the fast model of it")
    return verdict(averages["AveragedModel"], data, name="average")


if __name__ == "__main__":
    main()
