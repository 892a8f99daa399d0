"""A universal adversarial patch.

Brown et al. 2017, https://arxiv.org/abs/1712.09665, in a loop of one's own. One small patch is optimised so that it
breaks as many images as possible, wherever it is put. The loop is as for a plain model: put the patch in, run the
model, `backward()`, step. Two lines change: a `FastAttackModel` is made, and the loop runs it. Its gradient at the
images goes on to the patch. Its weights are frozen, so no gradients of weights are computed.
`logits_dtype=torch.float64` keeps the cross entropy of images that the model is sure of from saturating.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common import DigitsNet, batches, few_digits
from digits import accuracy, train
from fastadv_adapters import FastAttackModel

SIZE = 3
"""Side of the patch, of images of 8 x 8."""


def put(x: Tensor, patch: Tensor) -> Tensor:
    """The images with the patch at a random place of each."""
    places = torch.randint(x.shape[-1] - SIZE + 1, (len(x), 2))
    inside = torch.zeros_like(x)
    pasted = []
    for index, (row, column) in enumerate(places.tolist()):
        inside[index, :, row : row + SIZE, column : column + SIZE] = 1
        right, below = x.shape[-1] - SIZE - column, x.shape[-2] - SIZE - row
        pasted.append(F.pad(patch, (column, right, row, below)))
    return x * (1 - inside) + torch.stack(pasted) * inside


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train normally, make a patch and judge; returns accuracy on clean images, and with the patch."""
    torch.manual_seed(0)
    data, model = few_digits(images), DigitsNet(width=width)
    train(model, data.train_images, data.train_labels, epochs=epochs, show_progress=False)
    fast = FastAttackModel(model, logits_dtype=torch.float64)  # <- fast
    start = torch.rand(1, SIZE, SIZE)
    patch = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=0.1)
    for x, y in batches(data, epochs=epochs):
        optimizer.zero_grad()
        loss = -F.cross_entropy(fast(put(x, patch)), y)  # <- fast (`model` stood here)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)

    x, y = data.test_images, data.test_labels
    shares = [accuracy(model, x, y)]
    for seen in (start, patch.detach()):
        torch.manual_seed(1)  # the same places for both patches
        shares.append(accuracy(model, put(x, seen), y))
    print("right by the plain model: {:.1%} clean, {:.1%} with a random patch, {:.1%} with this patch".format(*shares))
    return shares[0], shares[2]


if __name__ == "__main__":
    main()
