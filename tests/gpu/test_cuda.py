"""What needs a CUDA device: recordings, streams, waiting, memory, layouts. `make test-gpu` runs these."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel, SafePGD
from fastadv_adapters.engines import choosing, graphs
from fastadv_adapters.engines.replay import ReplayEngine
from fastadv_adapters.modules.notices import FastAttackWarning
from fastadv_adapters.modules.precision import ieee_float32
from tests.support.tools import attackable_net, batch, cosine, input_gradient, reference, small_net

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("without_tf32")]

ENGINES = ["eager", "compile", "cudagraph"]
RECORDED = ["eager", "cudagraph"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """float32 as it is meant, for comparisons with float64; tests that are about the default say so."""
    with ieee_float32(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        yield


def on_gpu(samples: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    x, y = batch(samples, seed)
    return x.cuda(), y.cuda()


def net_on_gpu() -> nn.Module:
    return small_net().eval().cuda()


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operator that makes the host wait for the device is an error inside."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def times_waited(work: Callable[[], object]) -> int:
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def change(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.01)


@pytest.fixture
def four_recordings(monkeypatch: pytest.MonkeyPatch) -> int:
    """Engines that are made keep so many recordings at most: each takes seconds, and 32 tell no more than four."""
    most = 4
    monkeypatch.setattr(choosing, "ReplayEngine", partial(ReplayEngine, most=most))
    return most


# Compiling takes tens of seconds for each combination: two of them are tried.
EVERY = [(engine, name, decisions) for engine in RECORDED for name in DTYPES for decisions in ("auto", "exact")]
EVERY += [("compile", "float16", "auto"), ("compile", "float32", "exact")]


@pytest.mark.parametrize(("engine", "name", "decisions"), EVERY)
def test_every_dtype_and_engine_against_float64(engine: Any, name: str, decisions: Any) -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast = FastAttackModel(net, dtype=DTYPES[name], engine=engine, decisions=decisions)
    plain = reference(net)
    for _ in range(3):
        found, expected = input_gradient(fast, x, y), input_gradient(plain, x.double(), y)
        assert (cosine(found, expected) > (0.999 if name == "float32" else 0.95)).all()
        torch.testing.assert_close(fast(x).double(), plain(x.double()), rtol=1e-3, atol=1e-3)
    assert fast.engine == engine
    assert fast.gradient_stats.zero == fast.gradient_stats.nonfinite == 0


def test_auto_is_float16_in_cuda_graphs() -> None:
    fast = FastAttackModel(net_on_gpu())
    input_gradient(fast, *on_gpu())
    assert (fast.engine, fast.dtype) == ("cudagraph", torch.float16)


def test_a_stale_forward_is_recomputed() -> None:
    net, (x, y), (other, labels) = net_on_gpu(), on_gpu(seed=1), on_gpu(seed=2)
    fast, plain = FastAttackModel(net), FastAttackModel(net, engine="eager")
    leaf, leaf_of_other = x.clone().requires_grad_(), other.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    loss_of_other = nn.functional.cross_entropy(fast(leaf_of_other), labels)
    (found,), (found_of_other,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(loss_of_other, leaf_of_other)
    assert (cosine(found, input_gradient(plain, x, y)) > 0.99).all()
    assert (cosine(found_of_other, input_gradient(plain, other, labels)) > 0.99).all()


def test_retain_graph() -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast, leaf = FastAttackModel(net, dtype=torch.float32), x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    again = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-8)


def test_updates_between_replays() -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast = FastAttackModel(net, dtype=torch.float32)
    for _ in range(3):
        change(net)
        found = input_gradient(fast, x, y)
        assert (cosine(found, input_gradient(reference(net), x.double(), y)) > 0.999).all()
    assert fast.engine == "cudagraph"


def test_many_shapes_and_bounded_memory(four_recordings: int) -> None:
    net = net_on_gpu()
    fast, plain = FastAttackModel(net, dtype=torch.float32), FastAttackModel(net, dtype=torch.float32, engine="eager")
    largest = 40
    input_gradient(fast, *on_gpu(largest))
    torch.cuda.synchronize()
    after_the_largest = torch.cuda.memory_reserved()
    for samples in [1, 17, 39, 1, 17, 39]:
        x, y = on_gpu(samples)
        assert (cosine(input_gradient(fast, x, y), input_gradient(plain, x, y)) > 0.999).all()
    torch.cuda.synchronize()
    assert len(recordings(fast)) <= four_recordings
    assert torch.cuda.memory_reserved() <= after_the_largest + 64 * 2**20


def test_on_other_streams_and_from_threads() -> None:
    net, work = net_on_gpu(), [on_gpu(4, seed) for seed in range(4)]
    fast = FastAttackModel(net, dtype=torch.float32)
    expected = [input_gradient(reference(net), x.double(), y) for x, y in work]
    torch.cuda.synchronize()
    found: dict[int, Tensor] = {}

    def attack(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                found[index] = input_gradient(fast, *work[index])
        stream.synchronize()

    for index in range(len(work)):
        attack(index)
    threads = [threading.Thread(target=attack, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((cosine(found[index], expected[index]) > 0.999).all() for index in range(len(work)))


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_backward_and_update_do_not_wait(engine: Any) -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast = FastAttackModel(net, engine=engine)
    for _ in range(2):
        input_gradient(fast, x, y)
        fast(x)
    change(net)
    with no_waiting():
        fast.update()
        for _ in range(3):
            input_gradient(fast, x, y)
            fast(x)
    with pytest.raises(RuntimeError), no_waiting():
        fast.gradient_stats  # noqa: B018  # reading waits: the mode is at work


def test_the_loop_of_safe_pgd_does_not_wait() -> None:
    # Where half precision alone holds a sample to be broken, it is attacked once more: not here.
    fast, (x, y) = FastAttackModel(attackable_net().cuda(), dtype=torch.float32), on_gpu()
    waited = []
    for steps in (2, 2, 20):
        attack = SafePGD(fast, eps=0.1, steps=steps)
        waited.append(times_waited(lambda attack=attack: attack(x, y)))  # type: ignore[misc]
    assert waited[1] == waited[2]
    assert 0 < waited[1] <= 8


@pytest.mark.parametrize("engine", RECORDED)
def test_memory_does_not_grow(engine: Any) -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast = FastAttackModel(net, engine=engine)
    held = []
    for round_ in range(200):
        change(net)
        input_gradient(fast, x, y)
        if round_ in (20, 199):
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0]


def allocated() -> int:
    """Bytes that tensors hold, without the workspaces that cuBLAS keeps for every stream it has seen."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_dropping_a_fast_model_frees_its_memory() -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    before = allocated()
    fast = FastAttackModel(net)
    input_gradient(fast, x, y)
    del fast
    assert allocated() <= before


def test_the_libraries_are_as_strong() -> None:
    foolbox, torchattacks = pytest.importorskip("foolbox"), pytest.importorskip("torchattacks")
    from fastadv_adapters.foolbox import FastPyTorchModel

    net, (x, y) = attackable_net().cuda(), on_gpu(40)
    y = net(x).argmax(1)

    def right(adversarial: Tensor) -> int:
        with torch.no_grad():
            return int((net(adversarial).argmax(1) == y).sum())

    plain = right(torchattacks.PGD(net, eps=0.004, alpha=0.001, steps=10, random_start=False)(x, y))
    fast = right(torchattacks.PGD(FastAttackModel(net), eps=0.004, alpha=0.001, steps=10, random_start=False)(x, y))
    assert 0 < plain < len(y)
    assert fast <= plain + 1
    attack = foolbox.attacks.LinfPGD(steps=10, random_start=False)
    found = [
        right(attack(kind(net, bounds=(0, 1)), x, y, epsilons=0.004)[1])
        for kind in (foolbox.PyTorchModel, FastPyTorchModel)
    ]
    assert found[1] <= found[0] + 1


def test_channels_last_is_kept_through_the_network() -> None:
    from torch.profiler import ProfilerActivity, profile

    net, (x, y) = net_on_gpu(), on_gpu(16)
    fast = FastAttackModel(net, dtype=torch.float16, engine="eager")
    input_gradient(fast, x, y)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        input_gradient(fast, x, y)
        torch.cuda.synchronize()
    assert profiled.key_averages(), "the test needs a profile of kernels"
    conversions = [e.key for e in profiled.key_averages() if "nchwToNhwc" in e.key or "nhwcToNchw" in e.key]
    assert conversions == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_folding_is_not_refused_for_the_rounding_of_tf32(name: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    fast, (x, y) = FastAttackModel(attackable_net().cuda(), dtype=DTYPES[name]), on_gpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastAttackWarning)
        input_gradient(fast, x, y)
    assert "folded into" in fast.summary()
    assert not fast._networks.notes


def recordings(fast: FastAttackModel) -> dict[Any, Any]:
    found: dict[Any, Any] = fast._networks.fast._recordings  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("samples", [6, 64])
def test_cleared_workspaces_are_nobody_elses_memory(samples: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2048), nn.ReLU(), nn.Linear(2048, 10)).eval().cuda()
    x, y = torch.rand(samples, 3, 8, 8, device="cuda"), torch.randint(10, (samples,), device="cuda")
    fast = FastAttackModel(net, dtype=torch.float16)
    expected = input_gradient(fast, x, y)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.zeros(2**18, device="cuda") for _ in range(256)]
    for _ in range(10):
        assert torch.equal(input_gradient(fast, x, y), expected)
    assert not any(bool(other.any()) for other in others)
    assert fast.engine == "cudagraph"


def test_more_shapes_than_are_recorded(four_recordings: int) -> None:
    net = net_on_gpu()
    fast = FastAttackModel(net, dtype=torch.float32)
    for samples in range(2, four_recordings + 5):
        x, y = on_gpu(samples)
        assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.999).all()
    assert fast.engine == "cudagraph"
    assert len(recordings(fast)) == four_recordings


@pytest.mark.parametrize("engine", ENGINES)
def test_exact_decisions_are_the_twins_values_and_do_not_wait(engine: Any) -> None:
    net, (x, y) = net_on_gpu(), on_gpu()
    fast = FastAttackModel(net, engine=engine, decisions="exact", logits_dtype=torch.float64)
    for _ in range(2):
        input_gradient(fast, x, y)
    with no_waiting():
        leaf = x.clone().requires_grad_()
        logits = fast(leaf)
        torch.autograd.grad(logits.sum(), leaf)
    torch.testing.assert_close(logits.float(), net(x))


def test_attacks_that_search_for_the_least_are_as_strong_in_float16() -> None:
    foolbox = pytest.importorskip("foolbox")
    pytest.importorskip("torchattacks")
    from fastadv_adapters.foolbox import FastPyTorchModel
    from fastadv_adapters.torchattacks import accelerate

    net, (x, _) = attackable_net().cuda(), on_gpu(20)
    y = net(x).argmax(1)
    models = [foolbox.PyTorchModel(net, (0, 1)), FastPyTorchModel(net, (0, 1), decisions="exact")]
    found = [foolbox.attacks.DDNAttack(steps=20)(model, x, y, epsilons=None)[1] for model in models]
    broken = [net(adversarial).argmax(1) != y for adversarial in found]
    assert (broken[1] | ~broken[0]).all()
    with torch.no_grad():
        plain = int((net(auto_attack(net)(x, y)).argmax(1) == y).sum())
        assert int((net(accelerate(auto_attack(net))(x, y)).argmax(1) == y).sum()) <= plain + 1


def auto_attack(net: nn.Module) -> Any:
    """AutoAttack of torchattacks with 100 queries of Square for 5000, which would take longer than all other tests."""
    torchattacks = pytest.importorskip("torchattacks")
    attack = torchattacks.AutoAttack(net, eps=0.004, n_classes=10)
    (square,) = [part for part in attack._autoattack.attacks if type(part).__name__ == "Square"]
    square.n_queries = 100
    return attack


# --- what may break a capture, or stop for good: each in a process of its own, after all others -----------------------


class Reads(nn.Module):
    """Reads the device in its forward pass, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out * 2 if float(out.detach().abs().max()) >= 0 else out


@pytest.mark.own_process
def test_a_model_that_cannot_be_recorded_runs_eager_and_leaves_stream_and_generator_usable() -> None:
    net, (x, y) = Reads().eval().cuda(), on_gpu()
    stream, fast = torch.cuda.current_stream(), FastAttackModel(net, dtype=torch.float32)
    for _ in range(2):
        assert (cosine(input_gradient(fast, x, y), input_gradient(reference(net), x.double(), y)) > 0.999).all()
    assert fast.engine == "eager"
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").isfinite().all()
    assert SafePGD(fast, eps=0.1, steps=2)(x, y).shape == x.shape
    other = FastAttackModel(net_on_gpu(), dtype=torch.float32)
    input_gradient(other, x, y)
    assert other.engine == "cudagraph"


@pytest.mark.own_process
def test_recording_in_one_thread_while_another_runs_backward() -> None:
    x, y = on_gpu()
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                input_gradient(FastAttackModel(small_net(seed).eval().cuda()), x, y)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert failed == []


@pytest.mark.own_process
def test_a_capture_that_breaks_leaves_other_recordings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "refuse_what_waits", lambda device: nullcontext())  # so that it does break
    net, (x, y) = net_on_gpu(), on_gpu()
    other, broken = FastAttackModel(net, dtype=torch.float32), FastAttackModel(Reads().eval().cuda())
    expected = input_gradient(other, x, y)
    for _ in range(2):
        input_gradient(broken, x, y)
    assert broken.engine == "eager"
    assert torch.rand(3, device="cuda").isfinite().all()
    assert torch.equal(input_gradient(other, x, y), expected)
    input_gradient(other, x[:3], y[:3])
    torch.cuda.empty_cache()
    assert other.engine == "cudagraph"
