"""Whether two devices are one, where one of them is named without an index."""

from typing import Any

import pytest
import torch

from fastadv_adapters.modules import same_device


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("cpu", "cpu:0", True),
        ("mps", "mps:0", True),
        ("cuda", "cuda:1", True),
        ("cuda", "cuda:0", False),
        ("cuda", "cuda", True),
        ("cuda:0", "cuda:1", False),
        ("cuda", "cpu", False),
        ("meta", "meta", True),
        (torch.device("cpu", 0), torch.device("cpu"), True),
    ],
)
def test_a_device_without_an_index_is_the_current_one(
    one: Any, other: Any, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert same_device(one, other) is same_device(other, one) is same


def test_without_cuda_its_first_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert same_device("cuda", "cuda:0")
    assert not same_device("cuda", "cuda:1")
