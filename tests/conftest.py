"""What every test starts from, and the watch over wrapped models."""

from collections.abc import Iterator

import pytest
import torch

from fastadv_adapters.model import FastAttackModel
from tests.tools import fingerprint

# The models are tiny, and the runner uses a process per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
