"""Attention in bfloat16 on a processor, both ways: against float64, and PyTorch's own where ours does not fit."""

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadv_adapters import FastAttackModel
from fastadv_adapters.kernels import attention, calls, routing

BF = torch.bfloat16


class Attention(nn.Module):
    """As vision transformers write it."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.head, self.reentrant = nn.ModuleList(blocks), nn.Linear(16, 10), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            again: Any = checkpoint
            x = x + (block(x) if self.reentrant is None else again(block, x, use_reentrant=self.reentrant))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class MultiHead(nn.Module):
    def __init__(self, weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(16, 2, batch_first=True, **options), weights

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return output


WAYS = ["products", "float32"]


def take(way: str, patch: pytest.MonkeyPatch) -> None:
    """Have attention run in this way, whatever the processor is."""
    patch.setattr(calls, "HAS_AVX512_BF16", way == "products")
    patch.setattr(calls, "HAS_AMX", False)
    patch.setattr(attention, "SHORT", 0)


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In which way our attention runs."""
    take(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def uses(way: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the queries that our attention runs on."""
    found = list[Tensor]()
    place, name = (attention._Attend, "apply") if way == "products" else (attention, "_in_float32")
    run: Any = getattr(place, name)

    def noted(query: Tensor, *args: Any) -> Any:
        found.append(query)
        return run(query, *args)

    monkeypatch.setattr(place, name, noted)
    return found


@pytest.mark.parametrize(
    ("tokens", "avx512", "amx", "products"),
    [
        (129, True, False, True),
        (128, True, False, False),
        (129, False, False, False),
        (129, True, True, False),
        (129, False, True, False),
    ],
)
def test_products_are_taken_for_long_sequences_with_avx512_bf16_alone(
    tokens: int, avx512: bool, amx: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 128**2)
    monkeypatch.setattr(calls, "HAS_AVX512_BF16", avx512)
    monkeypatch.setattr(calls, "HAS_AMX", amx)
    x = torch.randn(1, 2, tokens, 4).to(BF).requires_grad_()
    assert ("_Attend" in graph_of(attention.attend(x, x, x))) == products


def graph_of(tensor: Tensor) -> str:
    """The names of all that its gradient runs through."""
    names, nodes = "", [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names += "" if node is None else f" {node.name()}"
        nodes += [] if node is None else [before for before, _ in node.next_functions]
    return names


def gradients(function: Any, tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f.double() - e).norm() / e.norm().clamp(min=1e-30)) for f, e in zip(found, exact, strict=True)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


@settings(max_examples=60)
@given(
    leading=st.sampled_from([(3,), (2, 3), (2, 1, 3)]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 16, 33]), st.sampled_from([8, 17])),
    mask=st.sampled_from(["none", "bool", "float", "half", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    block=st.sampled_from([1, 2**11, 2**19]),
    way=st.sampled_from(WAYS),
)
def test_as_near_to_float64_as_pytorchs(
    leading: tuple[int, ...], sizes: tuple[int, int, int, int], mask: str, scale: float | None, block: int, way: str
) -> None:
    torch.manual_seed(0)  # else an example depends on those before it
    rows, columns, width, out = sizes
    shapes = (*leading, rows, width), (*leading, columns, width), (*leading, columns, out)
    tensors, grad = [torch.randn(shape).to(BF) for shape in shapes], torch.randn(*leading, rows, out).to(BF)
    options: dict[str, Any] = {"scale": scale, "is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = torch.rand(rows, columns) < 0.7
        options["attn_mask"][:, 0] = True
    if mask in ("float", "half"):
        options["attn_mask"] = torch.randn(leading[-1] if mask == "float" else 1, rows, columns)
        options["attn_mask"] = options["attn_mask"].to(BF).to(torch.float32 if mask == "float" else BF)
    double = dict(options)
    if mask in ("float", "half"):
        double["attn_mask"] = options["attn_mask"].double()
    exact = gradients(F.scaled_dot_product_attention, [tensor.double() for tensor in tensors], grad, **double)
    half = dict(options) if mask != "float" else {**options, "attn_mask": options["attn_mask"].to(BF)}
    usual = errors(gradients(F.scaled_dot_product_attention, tensors, grad, **half), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        take(way, patch)
        ours = gradients(attention.attend, tensors, grad, **options)
    for found, wanted, near in zip(ours, exact, usual, strict=True):
        assert found.dtype == BF
        rounding = torch.finfo(BF).eps / 2  # of what is handed out
        assert float((found - wanted).norm()) <= (1.2 * near + rounding) * float(wanted.norm()) + 1e-3


def test_large_scores_are_not_rounded_to_16_bits() -> None:
    tensors, grad = [torch.randn(4, 3, 65, 64).to(BF) for _ in range(3)], torch.randn(4, 3, 65, 64).to(BF)
    tensors[0] *= 5
    exact = gradients(F.scaled_dot_product_attention, [tensor.double() for tensor in tensors], grad)
    usual = errors(gradients(F.scaled_dot_product_attention, tensors, grad), exact)
    ours = errors(gradients(attention.attend, tensors, grad), exact)
    assert max(ours) < 3e-3  # 9e-3 with scores in 16 bits
    assert sum(ours) <= sum(usual)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_nothing_are_those_of_pytorch(kind: str, uses: list[Tensor]) -> None:
    tensors, grad = [torch.randn(2, 2, 6, 8).to(BF) for _ in range(3)], torch.randn(2, 2, 6, 8).to(BF)
    seen = torch.rand(6, 6) < 0.6
    seen[2], seen[3] = False, True
    mask = seen if kind == "bool" else torch.zeros(6, 6, dtype=BF).masked_fill(~seen, -torch.inf)
    usual = gradients(F.scaled_dot_product_attention, tensors, grad, attn_mask=mask)
    found = gradients(attention.attend, tensors, grad, attn_mask=mask)
    assert uses
    for ours, theirs in zip(found, usual, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_second_derivatives() -> None:
    tensors = [torch.randn(2, 5, 8).to(BF) for _ in range(3)]
    found = []
    ways: list[tuple[Any, torch.dtype]] = [(attention.attend, BF), (F.scaled_dot_product_attention, torch.float64)]
    for function, dtype in ways:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([part.pow(2).sum() for part in first]).sum(), leaves))
    for ours, exact in zip(*found, strict=True):
        assert cosine(ours, exact) > 0.99


OTHERS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.5},
    "grouped": {"enable_gqa": True},
    "mask with a gradient": {"attn_mask": torch.zeros(6, 6, dtype=BF, requires_grad=True)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_pytorchs(name: str, uses: list[Tensor]) -> None:
    tensors, grad = [torch.randn(2, 2, 6, 8).to(BF) for _ in range(3)], torch.randn(2, 2, 6, 8).to(BF)
    found = []
    for function in (attention.attend, F.scaled_dot_product_attention):
        torch.manual_seed(0)
        found.append(gradients(function, tensors, grad, **OTHERS[name]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert not uses


def test_dtypes_sizes_and_shapes_that_do_not_fit_are_pytorchs(
    way: str, uses: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    attention.attend(x, x, x)
    attention.attend(x.to(BF), x.to(BF)[:, :1], x.to(BF)[:, :1])  # broadcast
    attention.attend(x.detach().to(BF), x.detach().to(BF), x.detach().to(BF))
    monkeypatch.setattr(attention, "LONGEST", 6 * 6 - 1)
    attention.attend(x.to(BF), x.to(BF), x.to(BF))
    assert not uses
    monkeypatch.setattr(attention, "LONGEST", 6 * 6)
    attention.attend(x.to(BF), x.to(BF), x.to(BF))
    assert len(uses) == 1
    monkeypatch.setattr(attention, "MOST", 2 * 6 * 6 - 1)
    attention.attend(x.to(BF), x.to(BF), x.to(BF))
    assert len(uses) == (1 if way == "products" else 2), "float32 keeps no scores"
    with pytest.raises(RuntimeError):
        attention.attend(x.to(BF), x.to(BF)[..., :4], x.to(BF))


def test_under_a_transform_it_is_pytorchs(uses: list[Tensor]) -> None:
    x = torch.randn(3, 2, 6, 8).to(BF)
    torch.func.grad(lambda x: attention.attend(x, x, x).sum())(x)
    assert not uses


NETS: dict[str, Any] = {
    "attention": lambda: Net(Attention(), Attention()),
    "checkpoints": lambda: Net(Attention(), Attention(), reentrant=False),
    "reentrant checkpoints": lambda: Net(Attention(), Attention(), reentrant=True),
    "multi-head": lambda: Net(MultiHead(False), MultiHead(False)),
    "multi-head with weights": lambda: Net(MultiHead(True), MultiHead(True)),
    "multi-head with additions": lambda: Net(MultiHead(False, add_bias_kv=True), MultiHead(False, add_zero_attn=True)),
    "encoder layers": lambda: Net(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", NETS)
def test_networks_take_it_and_leave_no_trace(name: str, uses: list[Tensor]) -> None:
    before = dict(vars(F)), dict(vars(torch.Tensor))
    net, x = NETS[name]().eval(), torch.randn(3, 7, 16)
    fast = FastAttackModel(net, dtype=BF, engine="eager")
    twin = copy.deepcopy(net)
    twin.reentrant = None  # autograd.grad does not go through those
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    (found,) = torch.autograd.grad(fast(leaf).sin().sum(), leaf)
    uses_in_fast = len(uses)
    wanted = torch.autograd.grad(twin(plain).sin().sum(), plain)[0]
    assert cosine(found, wanted) > 0.999
    assert len(uses) == uses_in_fast
    assert bool(uses) == (name != "multi-head with weights")
    assert (dict(vars(F)), dict(vars(torch.Tensor))) == before
    assert not fast._networks.notes
    uses.clear()
    net(plain)
    with torch.no_grad():
        fast(x)
    assert not uses


def test_other_threads_see_pytorchs(uses: list[Tensor]) -> None:
    x, found = torch.randn(1, 2, 6, 8, requires_grad=True), list[str]()

    class Waits(Attention):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            return super().forward(x)

    def beside() -> None:
        half = x.to(BF)
        found.append(type(F.scaled_dot_product_attention(half, half, half).grad_fn).__name__)

    part = Waits().requires_grad_(False)
    routing.route(part, FastAttackModel(part, dtype=BF)._networks.fast.precision)
    with torch.autocast("cpu", BF):
        part(torch.randn(2, 5, 16, requires_grad=True))
    assert len(uses) >= 1
    assert found
    assert not any("Attend" in name for name in found)


def test_networks_in_full_precision_and_large_modules_are_left_alone(uses: list[Tensor]) -> None:
    class Large(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Sequential(*(nn.Identity() for _ in range(routing.MOST)))

    for net, dtype in ((Net(Attention()), torch.float32), (Net(Large()), BF)):
        fast = FastAttackModel(net.eval(), dtype=dtype, engine="eager")
        fast(torch.randn(2, 5, 16, requires_grad=True))
    assert not uses
