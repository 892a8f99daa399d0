"""What every test starts from, and the watch over wrapped models."""

import gc
import os
import sys
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

from fastadv_adapters.boundary import DeviceState
from fastadv_adapters.kernels import routing, shapes
from fastadv_adapters.model import FastAttackModel
from fastadv_adapters.networks import pair
from tests.support.engines import use_engine
from tests.support.own_process import put_last, pytest_pyfunc_call  # noqa: F401  # pytest finds the hook here
from tests.support.tools import fingerprint
from tests.support.uncounted import is_uncounted
from tests.support.watch import Watch

# foolbox has numba compile for half a minute what runs for seconds here; read when numba is imported.
os.environ.setdefault("NUMBA_OPT", "0")
# The models are tiny, and the runner uses a process per core.
torch.set_num_threads(1)

# Property tests: the same 40 examples at every run; more of another seed with HYPOTHESIS_PROFILE=other and
# --hypothesis-seed; or many new ones with HYPOTHESIS_PROFILE=thorough.
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, print_blob=False)
hypothesis.settings.register_profile("other", max_examples=200, deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=5000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=["eager", "compile", "cudagraph"],
        default="eager",
        help='what runs every model whose engine is "auto"; make test-engines runs all tests with each',
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_last(items)
    for item in filter(is_uncounted, items):
        item.add_marker(pytest.mark.uncounted)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Thousands of tests and what they import stay until the end: no search for garbage has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Coverage stands still in tests, fixtures included, that take twice their time under it.

    It goes on after AutoAttack's look for dynamic defences, which ends whatever traces.
    """
    trace = sys.gettrace()
    if item.get_closest_marker("uncounted"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


@pytest.fixture(autouse=True, scope="session")
def chosen_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--engine") != "eager":
            use_engine(patch, request.config.getoption("--engine"))
        yield


@pytest.fixture(autouse=True, scope="session")
def small_inputs_are_like_large_ones() -> Iterator[None]:
    """What is left to PyTorch on small inputs, to save time, is run on these too, for the sake of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SMALL", 0)
        patch.setattr(routing, "LEAST", 0)
        yield


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries keep exponents and counts as tensors, as on an accelerator, where nothing may wait."""
    monkeypatch.setattr(pair, "state_on", DeviceState)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def watched() -> Iterator[Watch]:
    """No call of the package changes the model that it has wrapped, whatever the test itself does with it."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch()
        watch.begin(patch)
        yield watch
    assert not watch.changed


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every model wrapped inside the test is the same after it as when it was wrapped."""
    wrapped: list[tuple[torch.nn.Module, object]] = []
    original = FastAttackModel.__init__

    def remember(self: FastAttackModel, model: torch.nn.Module, **options: object) -> None:
        if isinstance(model, torch.nn.Module):
            wrapped.append((model, fingerprint(model)))
        original(self, model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FastAttackModel, "__init__", remember)
    yield
    for model, before in wrapped:
        assert fingerprint(model) == before, f"{type(model).__name__} was changed"
