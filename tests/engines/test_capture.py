"""Captures on CUDA, by what PyTorch's sources say of them: one at a time, and clean after one that broke."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastadv_adapters import FastAttackModel
from fastadv_adapters.boundary import Crossing, DeviceState, Packed, ends_of
from fastadv_adapters.engines import captures, eager, waiting
from fastadv_adapters.engines.graphs import CudaRecorder
from fastadv_adapters.engines.replay import ReplayEngine
from fastadv_adapters.engines.unchanging import CannotRecordError, addresses
from fastadv_adapters.engines.waiting import refuse_what_waits
from tests.support.engines import CpuRecorder, use_engine
from tests.support.fake_cuda import FakeCuda, breaking
from tests.support.tools import batch, input_gradient, small_net

CUDA = torch.device("cuda", 0)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCuda]:
    def make(end: str = "_cuda_endAllocateToPool", **options: Any) -> FakeCuda:
        cuda = FakeCuda(**options)
        cuda.install(monkeypatch, end)
        monkeypatch.setattr(captures, "_workspaces", {})
        monkeypatch.setattr(captures, "_broken", [])
        return cuda

    return make


# --- a capture that breaks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
def test_a_broken_capture_leaves_allocator_and_generator_right(end: str, install: Callable[..., FakeCuda]) -> None:
    cuda = install(end)
    recorder = CudaRecorder(CUDA)
    before = recorder.capture(lambda: None)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.capture(breaking(cuda))
    assert cuda.routed == set()
    assert cuda.uses[0, 1] == 1  # the graph from before
    assert not cuda.stuck
    before()
    recorder.capture(lambda: None)()
    assert len(captures._broken) == 1  # the allocator may ask it still


def test_a_capture_that_ends_itself_is_released_by_nobody_else(install: Callable[..., FakeCuda]) -> None:
    cuda = install(ends_itself=True)
    recorder = CudaRecorder(CUDA)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.capture(breaking(cuda))
    assert cuda.uses[0, 1] == 1
    assert cuda.routed == set()
    assert captures._broken == []
    recorder.capture(lambda: None)()


@pytest.mark.parametrize("error", [ValueError("its own"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")])
def test_an_error_of_the_work_ends_the_capture(error: BaseException, install: Callable[..., FakeCuda]) -> None:
    cuda = install()
    recorder = CudaRecorder(CUDA)

    def work() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        recorder.capture(work)
    assert raised.value is error
    assert (cuda.capturing, cuda.routed, cuda.stuck) == (None, set(), False)
    raised.value.with_traceback(None)
    recorder.capture(lambda: None)()


def test_a_capture_that_cannot_begin_is_cleaned_up_too(
    install: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = install()
    recorder, hold = CudaRecorder(CUDA), cuda.hold

    def hold_and_raise(pool: Any) -> None:
        monkeypatch.setattr(cuda, "hold", hold)
        hold(pool)
        raise RuntimeError("cudaStreamBeginCapture")

    monkeypatch.setattr(cuda, "hold", hold_and_raise)
    with pytest.raises(RuntimeError, match="cudaStreamBeginCapture"):
        recorder.capture(lambda: None)
    assert cuda.routed == set()
    assert cuda.uses[0, 1] == 0
    recorder.capture(lambda: None)()


def test_recordings_after_all_others_died_take_another_pool(install: Callable[..., FakeCuda]) -> None:
    cuda = install()
    recorder = CudaRecorder(CUDA)
    graph = recorder.capture(lambda: None)
    del graph
    gc.collect()
    assert cuda.dead == {(0, 1)}
    recorder.start_anew()
    recorder.capture(lambda: None)()


# --- beside others ----------------------------------------------------------------------------------------------------


def test_threads_record_one_after_the_other(install: Callable[..., FakeCuda]) -> None:
    install()
    inside: list[int] = []
    failed: list[BaseException] = []

    def work() -> None:
        inside.append(1)
        threading.Event().wait(0.002)
        assert inside == [1]
        inside.pop()

    def record() -> None:
        try:
            recorder = CudaRecorder(CUDA)
            recorder.warm(work, looks=True)
            recorder.capture(work)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not torch.backends.cudnn.benchmark


def test_nobody_replays_while_another_thread_captures(install: Callable[..., FakeCuda]) -> None:
    install()
    replay, begun, outcomes = CudaRecorder(CUDA).capture(lambda: None), threading.Event(), []

    def replay_meanwhile() -> None:
        begun.wait(10)
        try:
            outcomes.append(replay())
        except RuntimeError as error:
            outcomes.append(error)

    def work() -> None:
        begun.set()
        thread.join(0.05)

    thread = threading.Thread(target=replay_meanwhile)
    thread.start()
    CudaRecorder(CUDA).capture(work)
    thread.join(10)
    assert outcomes == [None]


def test_a_capture_waits_for_nothing_and_collects_nothing(install: Callable[..., FakeCuda]) -> None:
    cuda = install()
    collecting = []
    CudaRecorder(CUDA).capture(lambda: collecting.append(gc.isenabled()))
    assert collecting == [False]
    assert gc.isenabled()
    assert cuda.log == []


def test_what_warming_up_leaves_in_the_cache_is_given_back(install: Callable[..., FakeCuda]) -> None:
    cuda = install()
    recorder = CudaRecorder(CUDA)
    for work in (lambda: None, breaking(cuda)):
        cuda.log.clear()
        try:
            recorder.warm(work, looks=True)
        except RuntimeError:
            assert cuda.log == [("wait", 1, 0), ("wait", 0, 1)]
        else:
            assert cuda.log == [("wait", 1, 0), ("wait", 0, 1), ("empty",)]


def test_workspaces_are_cleared_where_a_stream_comes_again(install: Callable[..., FakeCuda]) -> None:
    cuda = install(streams=2)  # each recorder takes two, and captures on the second
    first = CudaRecorder(CUDA)
    kept = [first.capture(lambda: None) for _ in range(2)]
    assert cuda.cleared == 0
    second = CudaRecorder(CUDA)
    kept += [second.capture(lambda: None) for _ in range(2)]
    assert cuda.cleared == 1
    kept.append(first.capture(lambda: None))
    assert cuda.cleared == 2


def test_turns_are_ordered_by_an_event_and_not_by_a_stream(install: Callable[..., FakeCuda]) -> None:
    cuda = install()
    recorder, stream = CudaRecorder(CUDA), cuda.stream()
    with recorder.turn():
        pass
    assert cuda.log == []
    with cuda.on(stream), recorder.turn():
        pass
    with pytest.raises(ValueError, match="in a turn"), recorder.turn():
        raise ValueError("in a turn")
    with recorder.turn():
        pass
    other = stream.cuda_stream
    assert cuda.log == [("after", other, 0), ("after", 0, other), ("after", 0, 0)]


# --- what a recording cannot hold -------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: torch._unique2(x),
    "mask": lambda x: x[x > 0],
    "put": lambda x: x.clone().index_put_((x > 0,), x[0, :1].expand(int(x.numel()))[: x.numel()]),
    "repeat": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.long), 0),
}
GOES_ON: dict[str, Callable[[Tensor], object]] = {
    "indices": lambda x: x[torch.zeros(2, dtype=torch.long)],
    "fill": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "repeat": lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.long), 0, output_size=len(x)),
    "cast": lambda x: x.double().to(torch.float32),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_refused(name: str) -> None:
    with pytest.raises(CannotRecordError, match="waits for the device"), refuse_what_waits(torch.device("cpu")):
        WAITS[name](torch.ones(2, 3))


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_another_device_is_not(name: str) -> None:
    with refuse_what_waits(CUDA):
        assert WAITS[name](torch.ones(2, 3)) is not None


@pytest.mark.parametrize("name", GOES_ON)
def test_what_does_not_wait_goes_on(name: str) -> None:
    with refuse_what_waits(torch.device("cpu")):
        assert GOES_ON[name](torch.ones(2, 3)) is not None


@pytest.mark.parametrize("non_blocking", [False, True])
def test_copies_between_host_and_device_are_refused(non_blocking: bool) -> None:
    with FakeTensorMode():
        host, device = torch.empty(3), torch.empty(3, device=CUDA)
        for tensor, to in ((host, CUDA), (device, torch.device("cpu"))):
            with pytest.raises(CannotRecordError, match="between host and device"), refuse_what_waits(CUDA):
                tensor.to(to, non_blocking=non_blocking)
        write = torch.ops.aten.copy_.default  # a build without CUDA refuses it before any mode sees it
        with pytest.raises(CannotRecordError, match="between host and device"):
            waiting._Looking(CUDA).run(write, (device, host, non_blocking), {})
        with refuse_what_waits(CUDA):
            (device * torch.empty(()) + 1).half().to(CUDA)


class WaitsInBackward(nn.Module):
    """Its backward pass reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Reading.apply(self.net(x))  # type: ignore[no-untyped-call]
        return out


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (2.0 if float(grad.sum()) == torch.inf else 1.0)


def replaying(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> tuple[FastAttackModel, ReplayEngine, CpuRecorder]:
    use_engine(monkeypatch, "cudagraph")
    fast = FastAttackModel(net, dtype=torch.float32)
    engine = fast._networks.fast
    assert isinstance(engine, ReplayEngine)
    assert isinstance(engine.recorder, CpuRecorder)
    return fast, engine, engine.recorder


def test_a_wait_is_found_before_a_capture_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = WaitsInBackward(), batch()
    fast, _, recorder = replaying(monkeypatch, net)
    found = input_gradient(fast, x, y)
    assert torch.equal(found, input_gradient(FastAttackModel(net, dtype=torch.float32, engine="eager"), x, y))
    assert fast.engine == "eager"
    assert "waits for the device" in fast.summary()
    assert recorder.captured == 0


def test_numbers_on_the_host_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, number = batch()[0], torch.empty((), device="meta")
    engine = replaying(monkeypatch, small_net())[1]
    crossing: Any = None
    for tensors, recorded in (([x], True), ([x, number], False)):
        run = engine.bind(Packed((tuple(tensors), {})))
        assert (run._kind(tensors, [True, False][: len(tensors)], crossing) is not None) is recorded


def test_a_first_input_elsewhere_does_not_tell_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def watched(ends: Any, device: str, **settings: Any) -> Any:
        asked.append(device)
        return ends_of(ends, device, **settings)

    monkeypatch.setattr(eager, "ends_of", watched)
    x, number = batch()[0], torch.empty((), device="meta")
    crossing = Crossing(torch.float32, None, can_overflow=False, state=DeviceState(torch.device("cpu")))
    run: Any = lambda tensors: Packed(tensors[1] * 2)  # noqa: E731
    eager.EagerTape(run, [number, x], [False, True], crossing)
    assert asked == ["cpu"]


def test_a_number_on_the_host_that_changes_makes_recordings_old() -> None:
    net = nn.Linear(2, 2)
    net.factor = torch.tensor(2.0)
    before = {device: addresses(net, device) for device in (CUDA, torch.device("cpu"))}
    with torch.no_grad():
        net.factor.fill_(3.0)
    assert addresses(net, torch.device("cpu")) == before[torch.device("cpu")]
    assert addresses(net, CUDA) != before[CUDA]


# --- the caller's own recordings, and forgotten ones ------------------------------------------------------------------


def test_a_backward_pass_inside_of_the_callers_capture_replays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = small_net(), batch()
    fast, _, recorder = replaying(monkeypatch, net)
    expected = input_gradient(fast, x, y)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    replayed, recorder.recording = recorder.replayed, True
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert recorder.replayed == replayed


def test_forgotten_recordings_with_a_backward_pass_to_come_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = small_net(), batch()
    fast, engine, recorder = replaying(monkeypatch, net)
    input_gradient(fast, x, y)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(fast(leaf), y)
    pending = weakref.ref(next(iter(engine._recordings.values())))
    engine._forget()
    assert recorder.pools == 2
    assert pending() is not None
    (found,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found, input_gradient(FastAttackModel(net, dtype=torch.float32, engine="eager"), x, y))
    del loss
    gc.collect()
    assert pending() is None


def test_a_recording_that_is_interrupted_between_its_captures_leaves_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, engine, recorder = replaying(monkeypatch, small_net())
    input_gradient(fast, *batch(6))
    capture, interrupted = recorder.capture, iter([False, True])

    def capture_or_stop(work: Callable[[], object]) -> Callable[[], object]:
        if next(interrupted):
            raise KeyboardInterrupt
        return capture(work)

    monkeypatch.setattr(recorder, "capture", capture_or_stop)
    with pytest.raises(KeyboardInterrupt):
        input_gradient(fast, *batch(3))
    assert recorder.pools == 2  # the first of the two graphs is gone, and it may have been the only one of its pool
    assert len(engine._recordings) == 1


def test_memory_outside_of_the_recordings_is_reported_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, engine, recorder = replaying(monkeypatch, small_net())
    input_gradient(fast, *batch())
    recording = next(iter(engine._recordings.values()))
    recorder.used.clear()
    input_gradient(fast, *batch())
    assert recorder.used == [t.data_ptr() for t in (*recording._inputs, *recording._grads) if t is not None]
