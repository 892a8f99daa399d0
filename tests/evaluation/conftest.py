"""The network that these tests share stays as it is."""

from collections.abc import Iterator

import pytest

from tests.evaluation.runs import net
from tests.support.tools import fingerprint


@pytest.fixture(autouse=True)
def shared_net() -> Iterator[None]:
    """The test that changes it fails, not the ones after it."""
    before = fingerprint(net())
    yield
    assert fingerprint(net()) == before
