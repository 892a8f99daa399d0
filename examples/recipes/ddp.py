"""Distributed training with DDP.

Run it with `torchrun --nproc-per-node 2 examples/recipes/ddp.py`. Every process attacks its own share of the batch and
takes the step through DDP. One line changes: the attack gets a `FastAttackModel` of the DDP model. The fast model runs
the module inside and follows each step; an attack exchanges nothing between the processes. At the end the weights of
all processes are compared.
"""

import os

import torch
import torch.distributed as dist
import torchattacks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common import ALPHA, EPS, STEPS, Digits, DigitsNet, batches, few_digits, verdict
from fastadv_adapters import FastAttackModel


def same_everywhere(model: torch.nn.Module) -> bool:
    """Whether the weights are the same, bit for bit, in all processes."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(flat, other) for other in found)


def train(model: DigitsNet, data: Digits, *, epochs: int) -> None:
    """Train in all processes together; DDP is made here, so that it is gone before the process group is destroyed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ddp = DistributedDataParallel(model)
    attack = torchattacks.PGD(FastAttackModel(ddp), eps=EPS, alpha=ALPHA, steps=STEPS)  # <- fast (not `ddp`)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=5e-3)
    for x, y in batches(data, epochs=epochs):
        mine = slice(rank, None, world)
        adversarial = attack(x[mine], y[mine])
        ddp.train()
        optimizer.zero_grad()
        F.cross_entropy(ddp(adversarial), y[mine]).backward()
        optimizer.step()


def main(*, epochs: int = 4, images: int = 1408, width: int = 16) -> tuple[float, float]:
    """Train in as many processes as torchrun has started (alone without it) and judge; returns the accuracies."""
    if "RANK" in os.environ:  # torchrun has set it
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same order of the images everywhere
    data, model = few_digits(images), DigitsNet(width=width)
    train(model, data, epochs=epochs)
    same = same_everywhere(model)
    dist.barrier()  # a process that leaves while others still exchange may be aborted
    dist.destroy_process_group()
    if rank > 0:  # one verdict is enough
        return 0.0, 0.0
    print(f"processes: {world}; the weights are the same in all: {same}")
    return verdict(model, data, name="DDP")


if __name__ == "__main__":
    main()
