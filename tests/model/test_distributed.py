"""Two processes that train one model: weights stay the same, and attacks wait for nobody."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel, SafePGD
from tests.support.tools import batch, input_gradient, settle

pytestmark = pytest.mark.long

FLOAT32: Any = {"dtype": torch.float32}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    settle(made)
    return made


def collectives() -> int:
    """How many this process has taken part in."""
    group: Any = distributed.group.WORLD
    return int(group._get_sequence_number_for_group())


def are_the_same(tensor: Tensor) -> bool:
    everywhere = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(everywhere, tensor)
    return torch.equal(everywhere[0], everywhere[1])


def agrees(fast: FastAttackModel, plain: nn.Module) -> bool:
    ours, theirs = (input_gradient(model, *batch(4)) for model in (fast, plain.eval()))
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def in_turn(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(path, 2)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        trained_by_ddp(rank)
        sharded(rank)
        Path(f"{path}-{rank}").touch()
        distributed.barrier()  # a process that leaves while the other still exchanges may be aborted
    finally:
        distributed.destroy_process_group()


def trained_by_ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(net(seed=rank))
    fast = FastAttackModel(model, **FLOAT32)
    attack = SafePGD(fast, eps=0.1, steps=2, generator=torch.Generator().manual_seed(rank))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batch(4, seed=rank)
    for _ in range(2):
        before = collectives()
        for _ in range(1 + 2 * rank):  # a rank that attacked more often would wait for ever
            adversarial = attack(x, y)
        assert collectives() == before
        F.cross_entropy(model.train()(adversarial), y).backward()
        assert collectives() > before, "the count should see those of training"
        optimizer.step()
        optimizer.zero_grad()
    assert agrees(fast, model.module)
    assert all(are_the_same(p.detach()) for p in model.parameters())


def sharded(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import
    from torch.distributed.fsdp import fully_shard

    plain = net(seed=0)
    model = copy.deepcopy(plain)
    fully_shard(model[4])
    fully_shard(model)
    with pytest.raises(ValueError, match="expected a model with whole weights on this rank, got FSDPSequential"):
        FastAttackModel(model, **FLOAT32)
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # PyTorch 2.6 itself cannot run a sharded model on a processor
    fast = FastAttackModel(plain, **FLOAT32)
    x, y = batch(4, seed=rank)
    F.cross_entropy(model.eval()(x), y).backward()  # in training mode each rank has running statistics of its own
    torch.optim.SGD(model.parameters(), 0.5).step()
    before = input_gradient(fast, *batch(4))
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert agrees(fast, plain)
    after = input_gradient(fast, *batch(4))
    assert not torch.allclose(after, before, rtol=1e-3)
    assert are_the_same(after)


def test_two_processes_keep_the_same_weights_and_attack_without_each_other(tmp_path: Path) -> None:
    spawn(in_turn, args=(str(tmp_path / "store"),), nprocs=2)
    assert {"store-0", "store-1"} <= {path.name for path in tmp_path.iterdir()}, "both came to the end"
