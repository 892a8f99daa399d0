"""What is prepared for CUDA: off unless switched on; its dtypes by CUDA's own rules, its numbers on a processor."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastadv_adapters import FastAttackModel
from fastadv_adapters.folding import Trace, build_fast
from fastadv_adapters.folding.fused import _Fused
from fastadv_adapters.kernels import SWITCHES, switched
from fastadv_adapters.kernels.first import _Padded
from fastadv_adapters.kernels.narrow import NARROW
from fastadv_adapters.kernels.prepared import Switches
from fastadv_adapters.modules import Precision
from tests.support.tools import CountOperators, batch, cosine, reference, small_net

EVERYTHING = {"narrow_norms": True, "narrow_stream": True, "fused": True, "first_channels": 8}


class Stream(nn.Module):
    """A residual stream of tokens (N, 4, 8) under norms of every kind, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.gain = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.rand(8) + 0.5)
        self.first, self.second, self.third = nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 4)
        self.enter, self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.place
        x = x + self.gain * self.one(self.first(x))
        x = x + self.two(self.second(x)).relu()
        x = x + self.three(self.third(x)).relu()
        return F.layer_norm(x, (8,), self.gain, None)


def step(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return output.detach(), torch.autograd.grad(output.sin().sum(), leaf)[0]


def network_of(fast: FastAttackModel) -> nn.Module:
    return fast._networks.folded.network


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.01)


# --- off --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{"device": "cpu"}, EVERYTHING], ids=["off", "on for another device"])
def test_nothing_is_used_unless_it_is_switched_on_for_the_device(switches: dict[str, Any]) -> None:
    assert Switches() == SWITCHES
    with switched(**switches):
        for model, x in ((small_net(), batch()[0]), (Stream(), torch.randn(2, 4, 8))):
            fast = FastAttackModel(model.eval(), dtype=torch.bfloat16, engine="eager")
            step(fast, x)
            for part in network_of(fast).modules():
                assert not isinstance(part, (_Padded, _Fused))
                assert not NARROW.keys() & vars(part).get("operators", {}).keys()
                if isinstance(part, (Stream, nn.LayerNorm)):
                    assert {p.dtype for p in part.parameters(recurse=False)} == {torch.float32}


def test_the_switches_are_as_before_afterwards() -> None:
    with pytest.raises(TypeError, match="no_such"), switched(no_such=1):
        raise AssertionError("it is not there")
    with switched(fused=True), switched(first_channels=4):
        assert Switches(fused=True, first_channels=4) == SWITCHES
    assert Switches() == SWITCHES


# --- norms and the stream ---------------------------------------------------------------------------------------------


def on_cuda(**switches: bool) -> CountOperators:
    """Operators of a pass with their dtypes, by the rules of CUDA's autocast, on tensors without numbers."""
    precision, counted = Precision(torch.device("cuda"), torch.float16, channels_last=False), CountOperators()
    with switched(**switches):
        network = build_fast(Stream().requires_grad_(False), Trace(), precision, lays_out_ahead=False).network
    with FakeTensorMode():
        for part in network.modules():
            for name, own in part._parameters.items():
                if own is not None:
                    fake = torch.empty(own.shape, dtype=own.dtype, device="cuda")
                    part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        with precision.context(), counted:
            network(torch.empty(2, 4, 8, device="cuda"))
    return counted


def test_on_cuda_norms_and_the_stream_stay_in_16_bits() -> None:
    norms = "native_layer_norm", "native_group_norm"
    half, full = {torch.float16}, {torch.float32}

    def dtypes(counted: CountOperators, *names: str) -> set[torch.dtype]:
        return {dtype for name in names for call in counted.dtypes[name] for dtype in call}

    usual, narrow = on_cuda(), on_cuda(narrow_norms=True)
    assert dtypes(usual, *norms) == full
    assert torch.float32 in dtypes(narrow, "add")  # by what is added, in the model's own code
    stream = on_cuda(narrow_norms=True, narrow_stream=True)
    assert dtypes(stream, *norms) == half
    sums = [call for call in stream.dtypes["add"] if len(call) > 2]  # not with eps, inside the RMS norm
    assert len(sums) == 4
    assert {dtype for call in sums for dtype in call} == half


@pytest.mark.parametrize("stream", [False, True])
def test_narrow_norms_are_near_the_plain_model_and_follow_it_in_place(stream: bool) -> None:
    torch.manual_seed(0)
    model, x = Stream().eval(), torch.randn(16, 4, 8)
    with switched(narrow_norms=True, narrow_stream=stream, device="cpu"):
        fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
        step(fast, x)
        network = network_of(fast)
        norm = network.get_submodule("first")
        assert norm.weight.dtype == torch.bfloat16
        assert network.get_parameter("place").dtype == (torch.bfloat16 if stream else torch.float32)
        memory = [p.data_ptr() for p in network.parameters()]
        for _ in range(2):
            for found, wanted in zip(step(fast, x), step(model, x), strict=True):
                assert cosine(found, wanted).min() > 0.99
            torch.testing.assert_close(norm.weight, model.first.weight.bfloat16())
            train(model)
        assert memory == [p.data_ptr() for p in network_of(fast).parameters()]


def test_a_norm_alone_keeps_its_statistics_in_full_precision() -> None:
    norm = NARROW[F.layer_norm]
    x, weight = 300 + torch.randn(4, 512).bfloat16(), torch.rand(512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x, (512,), weight, eps=1e-3)
    exact = F.layer_norm(x.double(), (512,), weight.double(), eps=1e-3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=1e-3)
    assert norm(x.double(), (512,), weight.double(), eps=1e-3).equal(exact)


# --- first layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_first_layer_on_more_channels_is_the_same(channels: int, dtype: torch.dtype, padding: Any) -> None:
    model, (x, _) = small_net().to(dtype).eval(), batch()
    model[0] = nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding, bias=False, dtype=dtype)
    with switched(first_channels=channels, device="cpu"):
        fast = FastAttackModel(model, dtype=dtype, engine="eager")
        step(fast, x.to(dtype))
        wide = network_of(fast).get_submodule("0")
        assert isinstance(wide, _Padded)
        assert [isinstance(part, _Padded) for part in network_of(fast).modules()].count(True) == 1
        memory = wide.wide.data_ptr()
        for _ in range(2):
            found, wanted = step(fast, x.to(dtype)), step(reference(model), x.double())
            for ours, exact in zip(found, wanted, strict=True):
                torch.testing.assert_close(
                    ours.double(), exact, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9
                )
            train(model)
    assert wide.wide.shape[1] == channels
    assert wide.wide[:, 3:].count_nonzero() == 0
    assert wide.wide.data_ptr() == memory == network_of(fast).get_parameter("0.weight").data_ptr()


def test_a_first_layer_runs_in_half_precision_on_more_channels() -> None:
    model, (x, _) = small_net().eval(), batch()
    with switched(first_channels=8, device="cpu"):
        fast = FastAttackModel(model, dtype=torch.bfloat16, engine="eager")
        step(fast, x)
        with CountOperators() as counted:
            found = step(fast, x)
    assert counted.dtypes["constant_pad_nd"][0] == (
        torch.bfloat16,
        torch.bfloat16,
    )  # and again, to cut off the gradient
    assert cosine(found[1], step(copy.deepcopy(model), x)[1]).min() > 0.98
