"""Weights written into the fast network: right to the last bit, whatever the way there."""

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding import writing
from fastadv_adapters.folding.writing import Writing, room_for
from tests.support.tools import settle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def random_weight(layout: torch.memory_format) -> Tensor:
    return torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theirs", LAYOUTS)
@pytest.mark.parametrize("ours", LAYOUTS)
@pytest.mark.parametrize("at_once", [2**18, 60, 1])
@pytest.mark.parametrize(("scaled", "with_room"), [(False, False), (True, False), (True, True)])
def test_rounds_once(
    dtype: torch.dtype,
    theirs: torch.memory_format,
    ours: torch.memory_format,
    at_once: int,
    scaled: bool,
    with_room: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "_AT_ONCE", at_once)
    weight, out = random_weight(theirs), torch.empty(7, 5, 3, 3, dtype=dtype, memory_format=ours)
    scale = torch.rand(7, 1, 1, 1, generator=torch.Generator().manual_seed(1)) if scaled else None
    write = Writing(weight, out, scale, room=room_for([out]) if with_room else None)
    for _ in range(2):  # the plan holds for new values, too
        weight.mul_(1.5)
        write()
        expected = weight if scale is None else weight * scale
        assert torch.equal(out, expected.to(dtype))
        assert out.is_contiguous(memory_format=ours)


def test_tells_the_version_counter() -> None:
    out = nn.Parameter(torch.empty(7, 5, 3, 3, dtype=torch.bfloat16), requires_grad=False)
    write = Writing(random_weight(torch.contiguous_format), out)
    before = out._version
    write()
    assert out._version > before, "else weights that are laid out once per update would stay old"


def test_knows_when_its_tensors_are_elsewhere() -> None:
    weight, out = nn.Parameter(random_weight(torch.contiguous_format)), torch.empty(7, 5, 3, 3)
    write = Writing(weight, out)
    assert write.is_between(weight, out)
    weight.data = weight.data.clone()
    assert not write.is_between(weight, out)
    assert not Writing(weight, out).is_between(weight, out.clone())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_storage_replaced_between_updates(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), up, nn.BatchNorm2d(6)))
    fast = FastAttackModel(model, dtype=dtype)
    for change in (lambda p: p.data.add_(0.1), lambda p: setattr(p, "data", p.data * 1.3), lambda p: p.data.add_(-0.2)):
        for p in model.parameters():
            change(p)
        fast.update()
        again = FastAttackModel(model, dtype=dtype)
        assert len(own_tensors(fast)) == 4
        for mine, theirs in zip(own_tensors(fast), own_tensors(again), strict=True):
            assert torch.equal(mine, theirs)


def own_tensors(fast: FastAttackModel) -> list[Tensor]:
    layers = [m for m in fast._networks.folded.network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
