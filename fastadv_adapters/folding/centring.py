"""Streams with a large mean, centred: what a batch norm takes away is never written.

A residual stream that only batch norms read may have a mean far larger than its spread, and in half precision the
spread is what rounding loses. The running statistics tell the mean. It is taken out of the biases of the layers that
write the stream, and out of the running means of the batch norms that read it: the same function, exactly.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass
class Stream:
    """Batch norms with the layers whose sum each of them reads, in the order of the network.

    Attributes:
        writers: names of the layers, each once.
        sums: name of a batch norm -> names of the layers in the sum that it reads.
    """

    writers: list[str] = field(default_factory=list)
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)


Name = Callable[[fx.Node], str]
"""The name of the layer that a node calls if it may write a stream, of the batch norm if it may read one, or ""."""


def find_stream(graph: fx.Graph, writes: Name, reads: Name, passes: Callable[[fx.Node], bool]) -> Stream:
    """All layers of a graph whose outputs reach batch norms alone, by way of sums.

    Args:
        graph: of a trace.
        writes: tells layers.
        reads: tells batch norms.
        passes: tells what hands its input on.
    """
    sums: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if name := writes(node):
            sums[node] = (name,)
        elif is_sum(node) and all(isinstance(a, fx.Node) and a in sums for a in node.args[:2]):
            sums[node] = tuple(name for a in node.args[:2] for name in sums[a])
        elif passes(node) and node.all_input_nodes and node.all_input_nodes[0] in sums:
            sums[node] = sums[node.all_input_nodes[0]]
    known = [name for node in sums for name in ([writes(node)] if writes(node) else [])]
    inside = {node for node in sums if not writes(node)}
    seen_elsewhere = {name for node, names in sums.items() if not _stays(node, inside, reads) for name in names}
    seen_elsewhere |= {name for name in known if known.count(name) > 1}  # called twice, with two means
    seen_elsewhere |= {name for names in sums.values() for name in names if names.count(name) > 1}
    read = {reads(user): sums[node] for node in sums for user in node.users if reads(user)}
    # What is not compensated in one sum may be in no other.
    while more := {n for names in read.values() if seen_elsewhere.intersection(names) for n in names} - seen_elsewhere:
        seen_elsewhere |= more
    kept = {norm: names for norm, names in read.items() if not seen_elsewhere.intersection(names)}
    centred = {name for names in kept.values() for name in names}
    return Stream([name for name in known if name in centred], kept)


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values and nothing else."""
    function = node.op == "call_function" and node.target in _ADDITIONS
    method = node.op == "call_method" and node.target in ("add", "add_")
    return (function or method) and len(node.args) == 2 and not node.kwargs


def _stays(node: fx.Node, inside: set[fx.Node], reads: Name) -> bool:
    """Whether everyone who reads a node is a batch norm, or a sum of the stream."""
    return bool(node.users) and all(user in inside or bool(reads(user)) for user in node.users)


class Centred:
    """Follows the means of a stream.

    Args:
        stream: the names.
        norms: the model's batch norms, by name, with the parts of their scales and shifts: (2, channels).
        layers: the model's layers, by name, with the own biases of the fast network.
    """

    def __init__(
        self,
        stream: Stream,
        norms: dict[str, tuple[_BatchNorm, Tensor]],
        layers: dict[str, tuple[nn.Module, Tensor]],
    ) -> None:
        self._stream, self._norms, self._layers = stream, norms, layers

    def __call__(self) -> None:
        """Take the means out of biases and shifts, both of which have just been brought up to date."""
        taken: dict[str, Tensor] = {}
        for name, writers in self._stream.sums.items():
            norm, (scale, shift) = self._norms[name]
            mean: Tensor = norm.running_mean.to(scale.dtype)  # type: ignore[union-attr]
            new = [writer for writer in writers if writer not in taken]
            if new:  # the first layer that is new in this sum
                mean = mean - sum(taken[writer] for writer in writers if writer in taken)
                taken.update({writer: self._take_out(writer, torch.zeros_like(mean)) for writer in new[1:]})
                taken[new[0]] = self._take_out(new[0], mean)
            shift.addcmul_(scale, sum(taken[writer] for writer in writers))

    def _take_out(self, writer: str, mean: Tensor) -> Tensor:
        """Take this out of a bias; returns what is gone, which half precision rounds."""
        layer, own = self._layers[writer]
        given: Any = layer.bias
        bias = torch.zeros_like(mean) if given is None else given.to(mean.dtype)
        own.copy_(bias - mean)
        return bias - own.to(mean.dtype)
