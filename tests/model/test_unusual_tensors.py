"""Integers beside images, sparse and complex tensors, and anomaly mode: right, or an error that says what to do."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.boundary import Packed
from fastadv_adapters.networks.trial import Trial

FLOAT32: Any = {"dtype": torch.float32}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def loss_of(output: Tensor) -> Tensor:
    output = output.abs() if output.is_complex() else output
    return (output * torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)).sum()


def agrees(fast: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    for of in (lambda m, x: m(x), lambda m, x: torch.autograd.grad(loss_of(m(x)), x)[0]):
        ours, theirs = (of(m, x.clone().requires_grad_()).detach() for m in (fast, model))
        assert ours.is_complex() == theirs.is_complex()
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x).to(fast(x).dtype), rtol=1e-4, atol=1e-4)


# --- integers beside what is attacked ---------------------------------------------------------------------------------


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 48), nn.Linear(48, 3)

    def forward(self, ids: Tensor, pixels: Tensor | None = None, scale: Any = 1.0) -> Tensor:
        features = self.embed(ids).mean(1)
        if pixels is not None:
            features = features + pixels.flatten(1)
        out: Tensor = self.head(features) * scale
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keywords", [True, False])
@pytest.mark.parametrize("rows", [4, 1], ids=["row-per-sample", "one-text-for-all"])
def test_integers_may_come_first(keywords: bool, rows: int, dtype: torch.dtype) -> None:
    model, ids = Multimodal(), torch.arange(20).view(4, 5)[:rows] % 9
    fast = FastAttackModel(model, dtype=dtype)
    found = []
    for m in (fast, model):
        x = images(4).requires_grad_()
        output = m(ids=ids, pixels=x) if keywords else m(ids, x)
        assert output.shape == (4, 3)
        found.append(torch.autograd.grad(loss_of(output), x)[0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
    assert fast.gradient_stats.samples == 4


def test_a_number_in_a_tensor_may_come_first() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(48, 3)

        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.head(x.flatten(1)) * scale
            return out

    model, scale = Scaled(), torch.tensor(3.0)
    found = []
    for m in (FastAttackModel(model, **FLOAT32), model):
        x = images().requires_grad_()
        found.append(torch.autograd.grad(loss_of(m(scale, x)), x)[0])
    torch.testing.assert_close(*found)


def test_integers_alone_are_for_values_without_gradients() -> None:
    model, ids = Multimodal(), torch.zeros(2, 5).long()
    fast = FastAttackModel(model, **FLOAT32)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids))
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids), model(ids))
    with pytest.raises(TypeError, match=r"an input that is a floating-point tensor, got torch.int64: convert it"):
        fast(ids)


# --- sparse -----------------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    adjacency: Tensor

    def __init__(self, layout: torch.layout, *, parameter: bool = False, attribute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = torch.eye(48) + torch.diag(torch.ones(47), 1)
        sparse = dense.to_sparse() if layout is torch.sparse_coo else dense.to_sparse_csr()
        if parameter:
            self.adjacency = nn.Parameter(sparse, requires_grad=False)
        elif attribute:
            self.adjacency = sparse
        else:
            self.register_buffer("adjacency", sparse)
        self.norm, self.head = nn.BatchNorm1d(48).eval(), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(torch.sparse.mm(self.adjacency, x.flatten(1).float().T).T))
        return out


def grown(model: Any) -> None:
    dense = torch.eye(48) * 2
    layout = model.adjacency.layout
    model.adjacency = (
        nn.Parameter(dense.to_sparse(), False)
        if isinstance(model.adjacency, nn.Parameter)
        else (dense.to_sparse() if layout is torch.sparse_coo else dense.to_sparse_csr())
    )


def scaled(model: Any) -> None:
    model.adjacency.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("auto_update", [True, False])
@pytest.mark.parametrize("where", ["buffer", "parameter", "attribute"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:.*run in float32, since")
def test_sparse_tensors_are_right_and_followed(
    layout: torch.layout, where: str, auto_update: bool, dtype: torch.dtype
) -> None:
    if where == "parameter" and layout is torch.sparse_csr:
        pytest.skip("PyTorch itself has no such parameters without a warning")
    model = Sparse(layout, parameter=where == "parameter", attribute=where == "attribute").eval()
    fast, tolerance = (
        FastAttackModel(model, dtype=dtype, auto_update=auto_update),
        1e-4 if dtype.itemsize == 4 else 0.05,
    )
    agrees(fast, model, images(), tolerance)
    for change in (scaled, grown, scaled):
        change(model)
        if not auto_update:
            fast.update()
        agrees(fast, model, images(), tolerance)


class Graph(nn.Module):
    """Takes features and an adjacency, and hands out a sparse matrix beside its scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(48, 10)

    def forward(self, adjacency: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(torch.sparse.mm(adjacency, x.flatten(1))).float()
        return scores, (scores * 2).to_sparse()


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (torch.sparse_coo, torch.float32),
        (torch.sparse_coo, torch.bfloat16),
        (torch.sparse_csr, torch.float32),
        (torch.sparse_csc, torch.float32),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*run in float32, since")
@pytest.mark.filterwarnings("ignore:.*the gradient of one sample reaches other samples")  # along the graph
def test_sparse_inputs_and_outputs(layout: torch.layout, dtype: torch.dtype) -> None:
    model = Graph()
    fast, found = FastAttackModel(model, dtype=dtype), []
    for m in (fast, model):
        adjacency = (torch.eye(6) + torch.diag(torch.ones(5), 1)).to_sparse(layout=layout)
        if layout is torch.sparse_coo:
            adjacency.requires_grad_()
        x = images().requires_grad_()
        scores, sparse = m(adjacency, x)
        assert sparse.layout is torch.sparse_coo
        leaves = [x, adjacency] if layout is torch.sparse_coo else [x]
        grads = torch.autograd.grad(loss_of(scores) + sparse.to_dense().square().sum(), leaves)
        found.append([scores.detach(), sparse.detach().to_dense(), *(g.to_dense() for g in grads)])
    for ours, theirs in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_nan_in_a_sparse_buffer_is_found() -> None:
    model = Sparse(torch.sparse_coo)
    model.adjacency._values()[3] = math.nan
    with pytest.raises(ValueError, match="got NaN in adjacency"):
        FastAttackModel(model)


def test_parameters_without_version_counters() -> None:
    with torch.inference_mode():
        model = Multimodal()
        model.register_buffer("mean", torch.ones(1))
    plain, x = Multimodal(), images(4)
    ids = torch.zeros(4, 5).long()
    found = []
    for m in (FastAttackModel(model, **FLOAT32), plain):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(loss_of(m(ids, leaf)), leaf)[0])
    torch.testing.assert_close(*found)


# --- complex ----------------------------------------------------------------------------------------------------------


class Spectrum(nn.Module):
    """Complex in the middle, in parameters and buffers, and at the end."""

    phase: Tensor

    def __init__(self, *, real: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.real = nn.Linear(48, 10), real
        self.filter = nn.Parameter(torch.randn(10, dtype=torch.complex64))
        self.inner = nn.Linear(10, 7, dtype=torch.complex64)
        self.register_buffer("phase", torch.polar(torch.ones(7), torch.arange(7.0)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(torch.fft.fft(self.head(x.flatten(1)).float()) * self.filter) * self.phase
        return out.abs() if self.real else out.conj()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.filterwarnings("ignore:.*run in float32, since")
def test_complex_tensors_inside_and_at_the_end(real: bool, dtype: torch.dtype) -> None:
    model = Spectrum(real=real).eval()
    fast, tolerance = FastAttackModel(model, dtype=dtype), 1e-4 if dtype == torch.float32 else 0.05
    agrees(fast, model, images(), tolerance)
    with torch.no_grad():
        model.filter.mul_(2j)
        model.phase.mul_(1j)
    agrees(fast, model, images(), tolerance)
    wide = fast.view(logits_dtype=torch.float64)(images())
    assert wide.dtype == (torch.float64 if real else torch.complex128)


def test_a_complex_input_is_attacked() -> None:
    class Signals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.filter, self.head = nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 3)

        def forward(self, signal: Tensor, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.filter(signal.conj()).abs()) * x.sum(1, keepdim=True)
            return out

    model = Signals()
    signal, x = torch.randn(4, 8, dtype=torch.complex64), torch.rand(4, 2)
    found = []
    for m in (FastAttackModel(model, **FLOAT32), model):
        leaves = [signal.clone().requires_grad_(), x.clone().requires_grad_()]
        found.append(torch.autograd.grad(loss_of(m(*leaves)), leaves))
    torch.testing.assert_close(*found)


# --- anomaly mode -----------------------------------------------------------------------------------------------------


class Steep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) * 3e4
        return out


class Root(nn.Module):
    """Has a NaN gradient where a value is zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((x.flatten(1) * 0).sqrt() * 0 + x.flatten(1))
        return out


@pytest.mark.parametrize("make", [Steep, Root])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_changes_nothing(make: Any, dtype: torch.dtype) -> None:
    results = []
    for anomaly in (False, True):
        with torch.autograd.set_detect_anomaly(anomaly), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast, x = FastAttackModel(make(), dtype=dtype), images().requires_grad_()
            found = [torch.autograd.grad(fast(x).logsumexp(1).sum(), x)[0] for _ in range(2)]
            (again,) = torch.autograd.grad(fast(x).logsumexp(1).sum(), x, create_graph=True)
            adversarial = SafePGD(fast, eps=0.05, steps=2, generator=torch.Generator().manual_seed(0))(
                images(), torch.arange(6)
            )
            assert torch.is_anomaly_enabled() == anomaly
        results.append([*found, again.detach(), adversarial, torch.tensor(fast.gradient_stats.nonfinite)])
        assert fast.dtype == dtype
    for without, with_anomaly in zip(*results, strict=True):
        assert torch.equal(without, with_anomaly)


def test_anomaly_mode_still_tells_of_the_callers_own_graph() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, fast = images().requires_grad_(), FastAttackModel(Steep(), **FLOAT32)
        with torch.autograd.set_detect_anomaly(True):
            loss = fast((x * 0).sqrt()).sum()
            with pytest.raises(RuntimeError, match="nan values"):
                torch.autograd.grad(loss, x)


# --- weights of one byte ----------------------------------------------------------------------------------------------


class OfOneByte(nn.Linear):
    """Keeps its weight as float8 and casts it in each pass, as models of reduced size do."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_one_byte(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Flatten(), OfOneByte(48, 32), nn.Tanh(), OfOneByte(32, 10)).eval(), images()
    fast = FastAttackModel(model, dtype=dtype)
    agrees(fast, model, x, 2e-2)
    trial = Trial(model, Packed(((x,), {})), [x], [True], fast._networks.precision, in_half=False)
    assert isinstance(trial.moved(), tuple | list), "what rounding does is seen by moving the other weights"


# --- weights of classes that hold other tensors -----------------------------------------------------------------------


class Codes(Tensor):
    """Integers and a scale, which know linear layers and little else."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Codes":
        made: Codes = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> "Codes":
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(str(func))


def test_weights_that_cannot_be_copied_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    codes = Codes(torch.ones(10, 48, dtype=torch.int8), torch.ones(10, 1))
    model[1].weight = nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ValueError, match=r"expected plain tensors as weights, got 1.weight of class Codes"):
        FastAttackModel(model)


def test_weights_that_hold_two_tensors_are_right() -> None:
    layer, x = nn.Linear(48, 10), images().requires_grad_()
    model, plain = nn.Sequential(nn.Flatten(), layer).eval(), layer.weight.detach()
    expected = torch.autograd.grad(loss_of(model(x)), x)[0]
    layer.weight = nn.Parameter(TwoTensor(plain, plain.clone()))
    found = torch.autograd.grad(loss_of(FastAttackModel(model, **FLOAT32)(x)), x)[0]
    torch.testing.assert_close(getattr(found, "a", found), expected)
