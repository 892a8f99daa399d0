"""Classes that list their objects, and methods that write into each: a copy's would write into the wrapped model."""

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from tests.support.agreement import agrees

FLOAT32: Any = {"dtype": torch.float32}


def listing(kind: str) -> Any:
    """A class of layers with a state, which lists its objects in this kind of container."""
    held: Any = {"list": [], "weak set": weakref.WeakSet(), "references": [], "names": weakref.WeakValueDictionary()}
    instances = held[kind]

    class Neuron(nn.Module):
        listed: ClassVar[Any] = instances

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mem = nn.Linear(16, 16), torch.zeros(())
            if kind == "list":
                instances.append(self)
            elif kind == "references":
                instances.append(weakref.ref(self))
            elif kind == "weak set":
                instances.add(self)
            else:
                instances[str(len(instances))] = self

        @classmethod
        def objects(cls) -> Iterator["Neuron"]:
            held = cls.listed.values() if kind == "names" else list(cls.listed)
            for item in held:
                yield item() if kind == "references" else item

        @classmethod
        def reset_all(cls) -> None:
            for neuron in cls.objects():
                neuron.mem = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.mem = 0.5 * self.mem + self.layer(x)
            return self.mem

    return Neuron


class Spiking(nn.Module):
    """Two layers with a state over three time steps, reset before each pass."""

    def __init__(self, neuron: Any, *, by_class: bool) -> None:
        super().__init__()
        self.first, self.second, self.by_class = neuron(), neuron(), by_class
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_class:
            type(self.first).reset_all()
        else:
            self.first.mem = self.second.mem = torch.zeros(())
        for _ in range(3):
            spikes = self.second(self.first(x).tanh()).tanh()
        return self.head(spikes)  # type: ignore[no-any-return]


KINDS = ["list", "weak set", "references", "names"]
x = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_resets_the_model_itself_is_refused(kind: str) -> None:
    neuron = listing(kind)
    net = Spiking(neuron, by_class=True).eval()
    expected = net(x)
    state = net.first.mem
    fast = FastAttackModel(net, **FLOAT32)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected a model whose copies leave it as it is"):
            fast(x.clone().requires_grad_())
    assert net.first.mem is state
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_resets_its_own_parts_is_taken(kind: str) -> None:
    neuron = listing(kind)
    net = Spiking(neuron, by_class=False).eval()
    agrees(FastAttackModel(net, **FLOAT32), net, x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_leaves_the_model_as_it_was(kind: str) -> None:
    neuron = listing(kind)
    net = Spiking(neuron, by_class=True).eval()
    net(x)
    states = net.first.mem, net.second.mem
    values = [state.clone() for state in states]
    FastAttackModel(net, **FLOAT32)
    assert net.first.mem is states[0]
    assert net.second.mem is states[1]
    torch.testing.assert_close([*states], values)
