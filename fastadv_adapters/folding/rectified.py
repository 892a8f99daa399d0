"""Which layers of a trace a ReLU alone reads, at once or by way of one sum: what one operator computes in one pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules import submodule_of
from .centring import is_sum

RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, _BatchNorm)


def find_rectified(root: nn.Module, graph: fx.Graph) -> Iterator[nn.Module]:
    """The convolutions of a graph, with batch norms behind them or without, that end in a ReLU in some call."""
    for node in graph.nodes:
        module = _module(root, node)
        reader = _reader(root, node) if isinstance(module, nn.Conv2d) else None
        if reader is not None and is_sum(reader):
            reader = _reader(root, reader)
        if module is not None and reader is not None and _is_relu(root, reader):
            yield module


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return submodule_of(root, str(node.target)) if node.op == "call_module" else None


def _reader(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Who alone reads a node, through what hands it on."""
    while len(node.users) == 1:
        (node,) = node.users
        if not isinstance(_module(root, node), _PASSING):
            return node
    return None


def _is_relu(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(_module(root, node)) is nn.ReLU or (node.op == "call_function" and node.target in RELUS)
