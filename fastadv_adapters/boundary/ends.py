"""Where half precision ends: the last matrix layers on the way to an output, and what comes behind them.

A layer behind which no other convolution or product comes hands out full precision, and what follows (a softmax, a
temperature, the model's own loss) runs in it with plain autograd. On the way back the gradient is scaled where it
enters half precision: at these layers' outputs, which are samples even where the model's own output is one loss.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree  # private by name, but what PyTorch's own transforms and exporters use

from ..modules import HALF, become, named_modules_of, submodule_of, widen

MATRIX = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)
"""Layers that autocast lowers, their subclasses included."""


@dataclass(frozen=True)
class Ends:
    """Where half precision ends in one kind of call.

    Attributes:
        layers: names of the last matrix layers.
        upper: those of them that read what others of them gave (the weights of a pooling over features): not cut at.
        calls: how often they are called in all.
        cut: whether anything follows; if not, the outputs are what these layers give.
        alone: whether no product of other code follows; else these too are kept in full precision.
    """

    layers: frozenset[str]
    calls: int
    cut: bool = True
    alone: bool = True
    upper: frozenset[str] = frozenset()


@dataclass
class Cuts:
    """The places of one run at which its graph is in two parts.

    Attributes:
        below: what the last layers gave, in full precision, with the graph of the network.
        above: the same values as leaves of the graph of what follows.
    """

    below: list[Tensor]
    above: list[Tensor]


@dataclass
class _Open:
    ends: Ends
    cuts: Cuts | None
    device: str
    passed: int = 0


class _Here(threading.local):
    """The run that this thread is in."""

    open: _Open | None = None


_here = _Here()


def ends_of(ends: Ends | None, device: str, *, cut: bool = False) -> AbstractContextManager[Cuts]:
    """Run the network inside, with half precision ending there, and with ``cut`` its graph in two parts."""
    if ends is None and _here.open is None:
        return nullcontext(Cuts([], []))
    return _ending(ends, device, cut=cut)


@contextmanager
def _ending(ends: Ends | None, device: str, *, cut: bool) -> Iterator[Cuts]:
    cuts = Cuts([], [])
    before, autocast = _here.open, torch.is_autocast_enabled(device)
    _here.open = None if ends is None else _Open(ends, cuts if cut and ends.cut else None, device)
    try:
        yield cuts
    finally:
        _here.open = before
        torch.set_autocast_enabled(device, autocast)


class _End:
    """Mixin for a matrix layer that hands out full precision in the calls in which half precision ends at it."""

    end_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        here: _Open | None = None if torch.compiler.is_compiling() else _here.open
        output = self._run(args, kwargs)
        if here is None or self.end_name not in here.ends.layers:
            return output
        output = pytree.tree_map(widen, output)
        here.passed += 1
        if not here.ends.alone and here.passed == here.ends.calls:
            torch.set_autocast_enabled(here.device, False)
        if here.cuts is None or self.end_name in here.ends.upper:
            return output
        return pytree.tree_map(_cut_into(here.cuts), output)

    def _run(self, args: Any, kwargs: Any) -> Any:
        weight = getattr(self, "weight", None)
        few = is_product(self) and (isinstance(self, nn.Linear) or (args and args[0].shape[2:].numel() == 1))
        if not few or not isinstance(weight, Tensor) or weight.dtype in HALF:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        # Logits are few: their own product costs nothing in full precision, and rounds them no more.
        with torch.autocast(weight.device.type, enabled=False):
            args, kwargs = pytree.tree_map(widen, (args, kwargs))
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def is_product(layer: object) -> bool:
    """Whether a layer multiplies the channels of each place by a matrix, as those do that give the logits."""
    pointwise = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(layer.kernel_size) == {1}
    return isinstance(layer, nn.Linear) or pointwise


def _cut_into(cuts: Cuts) -> Any:
    """What puts a leaf in the place of each tensor that has a graph."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        cuts.below.append(value)
        cuts.above.append(leaf)
        return leaf.clone()  # the model may write into it, which a leaf does not allow

    return cut


def mark_ends(network: nn.Module, layers: Iterable[str]) -> None:
    """Let these layers of a copied network hand out full precision if a run asks for it."""
    for name in layers:
        layer = submodule_of(network, name)
        if not isinstance(layer, _End):
            become(layer, _End)
            vars(layer)["end_name"] = name


@contextmanager
def matrix_calls(network: nn.Module) -> Iterator[list[tuple[str, list[Any]]]]:
    """The calls of matrix layers inside, in order: the name, and the nodes of the graph that made its outputs."""
    calls: list[tuple[str, list[Any]]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            calls.append((name, [t.grad_fn for t in tensors if t.grad_fn is not None]))

        return hook

    layers = [(name, part) for name, part in named_modules_of(network) if isinstance(part, MATRIX)]
    # Before hooks of the model's own, since the graph is cut before these.
    handles = [part.register_forward_hook(note(name), prepend=True) for name, part in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_ends(outputs: Sequence[Tensor], calls: Sequence[tuple[str, list[Any]]]) -> Ends | None:
    """The layers among ``calls`` that the graph of ``outputs`` meets first, if each is met at every call of it.

    Args:
        outputs: of a run, with its graph.
        calls: names of layers, and the nodes of the graph that made what they gave.
    """
    nodes = {node: place for place, (_, made) in enumerate(calls) for node in made}
    met = {nodes[node] for node in _walk(outputs, nodes) if node in nodes}
    names = {calls[place][0] for place in met}
    every = {place for place, (name, made) in enumerate(calls) if name in names and made}
    if not met or met != every:
        return None
    upper = frozenset(calls[place][0] for place in met if _reaches(calls[place][1], met, nodes))
    follows = any(o.grad_fn not in nodes for o in outputs)
    return Ends(frozenset(names), len([name for name, _ in calls if name in names]), cut=follows, upper=upper)


def with_siblings(ends: Ends, network: nn.Module, called: Iterable[str]) -> Ends:
    """The same with layers that were not called, but stand where a last one does: other experts of a mixture.

    A name like ``experts.1.out`` stands for ``experts.0.out``, and may be met in the next call.
    """
    idle = {name for name, part in named_modules_of(network) if isinstance(part, MATRIX)}.difference(called)

    def and_siblings(names: frozenset[str]) -> frozenset[str]:
        return names | {one for one in idle if any(_differ_in_a_number(one, name) for name in names)}

    return replace(ends, layers=and_siblings(ends.layers), upper=and_siblings(ends.upper)) if idle else ends


def _differ_in_a_number(one: str, other: str) -> bool:
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    return one.count(".") == other.count(".") and len(differ) == 1 and all(part.isdigit() for part in differ[0])


def _reaches(made: Sequence[Any], met: set[int], nodes: dict[Any, int]) -> bool:
    """Whether behind these nodes there are some that other last layers made: a cut would keep gradients from those."""
    own = nodes[made[0]]
    others = {node for node, place in nodes.items() if place in met and place != own}
    return any(node in others for node in _walk_from(list(made), others))


def is_full_above(outputs: Sequence[Tensor]) -> bool:
    """Whether no gradient between these outputs and the leaves of their graph is in half precision."""
    return dtypes_below(outputs).isdisjoint(HALF)


def dtypes_below(outputs: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes of gradients between these outputs and the leaves of their graph."""
    return {m.dtype for node in _walk(outputs, ()) for m in getattr(node, "_input_metadata", ())}


def depends_on(output: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of an output reaches one of these leaves, and not weights alone."""
    wanted = set(map(id, leaves))
    return any(id(getattr(node, "variable", None)) in wanted for node in _walk([output], ()))


def _walk(outputs: Sequence[Tensor], until: Any) -> Iterator[Any]:
    """The nodes of a graph from its outputs on, those in ``until`` included but not what lies behind them."""
    return _walk_from([o.grad_fn for o in outputs if o.grad_fn is not None], until)


def _walk_from(stack: list[Any], until: Any) -> Iterator[Any]:
    seen = set[Any]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in until:
            stack += [following for following, _ in node.next_functions if following is not None]
