"""What a trace tells about a model: which batch norm follows which layer, and who else reads that layer's output."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..modules import (
    children_of,
    clone,
    copy_module,
    first_line,
    has_hooks,
    modules_of,
    named_modules_of,
    parameters_of,
    random_state_kept,
    submodule_of,
    unwritten_by_copies,
)
from .centring import Stream, find_stream
from .own_forward import Alike
from .reading import read_unseen
from .rectified import find_rectified
from .tracer import Tracer, is_leaf, tracing

DOES_NOTHING = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""Layers that hand their input on in eval mode, by exact type."""

STOCK_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_DROPOUT_FUNCTIONS = (nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d)


@dataclass
class Trace:
    """Which layers of a module may be joined.

    Attributes:
        producer: name of a batch norm -> name of the layer whose output it alone reads, in every call of both.
        touched: names of modules whose parameters are read by other code than their own forward.
        unseen: names of modules whose parameters other code may read or replace where the trace does not show it.
        opaque: names of modules whose forward does not trace, with the reason.
        streams: sums of layers that batch norms alone read.
        rectified: names of layers that a ReLU alone reads, by way of a sum or not.
        own: name of a batch norm subclass -> see :meth:`own_forward`.
    """

    producer: dict[str, str] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    rectified: set[str] = field(default_factory=set)
    own: dict[str, bool | str] = field(default_factory=dict)
    _alike: Alike = field(default_factory=Alike, init=False)

    def own_forward(self, name: str, norm: nn.Module) -> bool | str:
        """Whether a subclass reads its input in its batch norm alone; or why that is to be kept. Traced once."""
        if name not in self.own:
            self.own[name] = self._alike.find(norm)
        return self.own[name]

    def without_streams(self) -> "Trace":
        """The same trace with no stream to be centred."""
        return replace(self, streams=[])

    def without_layers(self, layers: Collection[str]) -> "Trace":
        """The same trace with these layers not joined to a batch norm, and in no stream to be centred."""
        return replace(
            self,
            producer={n: layer for n, layer in self.producer.items() if layer not in layers},
            streams=[stream for stream in self.streams if set(stream.writers).isdisjoint(layers)],
        )

    def without(self, kinds: tuple[type[nn.Module], ...], module: nn.Module) -> "Trace":
        """The same trace with no layer of these kinds joined to a batch norm."""
        layers = self.producer.values()
        return self.without_layers({name for name in layers if isinstance(submodule_of(module, name), kinds)})


@dataclass(frozen=True)
class _Traced:
    """What was traced of one module.

    Attributes:
        root: the module.
        graph: of its calls.
        names: of all parts of the model, by identity.
    """

    root: nn.Module
    graph: fx.Graph
    names: dict[int, str]

    def called_by(self, node: fx.Node) -> nn.Module | None:
        """The module that this node calls."""
        return submodule_of(self.root, str(node.target)) if node.op == "call_module" else None

    def name_of(self, node: fx.Node | None) -> str:
        """The name of the module that this node calls; "" if it calls none."""
        module = None if node is None else self.called_by(node)
        return "" if module is None else self.names[id(module)]

    def passes_through(self, node: fx.Node) -> bool:
        """Whether this node hands its input on in eval mode."""
        module = self.called_by(node)
        if module is not None:
            return type(module) in DOES_NOTHING and not has_hooks(module)
        if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            return training is False
        return False

    def source(self, node: fx.Node) -> str:
        """Name of the layer whose output this node reads, through what hands it on; "" if it is no layer."""
        source = _input(node)
        while source is not None and self.passes_through(source):
            source = _input(source)
        return self.name_of(source)

    def readers(self, node: fx.Node) -> Iterator[str]:
        """Names of the modules that read this node's output; "" for any other reader."""
        for user in node.users:
            if self.passes_through(user):
                yield from self.readers(user)
            else:
                yield self.name_of(user) if _input(user) is node and len(user.all_input_nodes) == 1 else ""
        if not node.users:
            yield ""

    def read_tensors(self) -> Iterator[str]:
        """Names of the modules whose own tensors code reads here."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                yield self.names[id(submodule_of(self.root, str(node.target).rpartition(".")[0]))]


def trace(module: nn.Module) -> Trace:
    """Trace a throw-away copy of ``module`` as far as it traces; what does not is tried child by child.

    Nothing is run on the module itself: a forward that writes into buffers while it is traced writes into the copy.
    """
    copied = copy_module(module, clone)
    names = {id(m): name for name, m in named_modules_of(copied)}
    result, parts = Trace(), list[_Traced]()
    with unwritten_by_copies(module), tracing(copied), _quietly(copied), torch.no_grad():
        for root, graph in _graphs(copied, names, result.opaque):
            parts.append(_Traced(root, graph, names))
            result.rectified |= {names[id(layer)] for layer in find_rectified(root, graph)}
            result.touched.update(parts[-1].read_tensors())
    for reader in read_unseen(copied, result.opaque):
        result.unseen |= {names[id(part)] for part in modules_of(reader)}
    result.producer = _pair(parts)
    result.streams = list(_streams(parts, result))
    return result


def holds_parameters(layer: nn.Module) -> bool:
    """Whether a layer's weight and bias, if it has one, are parameters: code may have made buffers of them."""
    return layer._parameters.get("weight") is not None and "bias" in layer._parameters


def _streams(parts: list[_Traced], known: Trace) -> Iterator[Stream]:
    """The streams of each graph, of convolutions and batch norms that are called in no other."""
    called = [name for part in parts for node in part.graph.nodes if (name := part.name_of(node))]
    others = {*known.producer, *known.producer.values()} | known.touched | known.unseen

    def name_in(part: _Traced, kinds: tuple[type[nn.Module], ...], node: fx.Node) -> str:
        module, name = part.called_by(node), part.name_of(node)
        if type(module) not in kinds or module is None or has_hooks(module) or name in others:
            return ""
        fits = isinstance(module, _BatchNorm) or holds_parameters(module)
        return name if fits and called.count(name) == 1 else ""

    for part in parts:
        writes, reads = partial(name_in, part, CONVOLUTIONS), partial(name_in, part, STOCK_NORMS)
        stream = find_stream(part.graph, writes, reads, part.passes_through)
        if stream.sums:
            yield stream


@contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Without warnings, and with the random state left as it was."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for device in {torch.device("cpu"), *(p.device for p in parameters_of(module))}:
            stack.enter_context(random_state_kept(device))
        yield


def _graphs(root: nn.Module, names: dict[int, str], opaque: dict[str, str]) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """The graphs of ``root``, or of its children where it does not trace, and so on downwards."""
    tracer = Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        opaque[names[id(root)]] = first_line(error)
        failed = [root]
    else:
        yield root, graph
        for name in tracer.hooked:
            yield from _graphs(submodule_of(root, name), names, opaque)
        failed = [submodule_of(root, name) for name in tracer.failed]
        opaque.update({names[id(submodule_of(root, name))]: why for name, why in tracer.failed.items()})
    for child in (child for module in failed for child in children_of(module) if not is_leaf(child)):
        yield from _graphs(child, names, opaque)


def _pair(parts: list[_Traced]) -> dict[str, str]:
    """Batch norm -> layer, where every call of the one meets a call of the other and nothing else."""
    sources: dict[str, set[str]] = {}
    readers: dict[str, set[str]] = {}
    for part in parts:
        for node in part.graph.nodes:
            module, name = part.called_by(node), part.name_of(node)
            if isinstance(module, _BatchNorm):
                sources.setdefault(name, set()).add(part.source(node))
            elif isinstance(module, (_ConvNd, nn.Linear)):
                readers.setdefault(name, set()).update(part.readers(node))
    pairs = {norm: next(iter(layers)) for norm, layers in sources.items() if len(layers) == 1}
    return {norm: layer for norm, layer in pairs.items() if readers.get(layer) == {norm}}


def _input(node: fx.Node) -> fx.Node | None:
    """The one input of a node, if it has just one argument that is a node."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None
