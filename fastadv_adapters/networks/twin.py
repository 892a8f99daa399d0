"""The full-precision twin: the wrapped model's structure, in eval mode, on its own weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..boundary import Packed
from ..engines import EagerEngine
from ..folding import CopyHeld, ReplaceTensor
from ..modules import (
    Precision,
    Restore,
    alias,
    are_listed,
    buffers_of,
    clone,
    copy_module,
    differ,
    in_one_block,
    is_out_of_memory,
    modules_of,
    own_dtype,
    parameters_of,
    random_state_kept,
    registered_in,
    same_memory,
    tensors_in,
    tensors_in_containers,
    thaw,
    to_eval_mode,
    unwritten_by_copies,
    write,
)
from .freshness import Change, Freshness


class Twin:
    """A copy of the source whose parameters are the source's own, as detached aliases.

    Buffers and plain attributes are always the twin's own, since a forward pass may write into them.

    Args:
        source: the wrapped model.
        precision: of the fast network; the twin takes the device from it.
        live: whether parameters are aliases; else they are clones, which stay as they are until :meth:`follow`.

    Attributes:
        thawed: whether weights want a gradient as the source's do.
    """

    def __init__(self, source: nn.Module, precision: Precision, *, live: bool) -> None:
        self.live, self._source, self.thawed = live, source, False
        aliased = {id(p) for p in parameters_of(source)} if live else set()
        self._held = CopyHeld(tensors_in_containers(source))
        network = copy_module(
            source, lambda tensor: alias(tensor) if id(tensor) in aliased else self._held.note(tensor, clone(tensor))
        )
        if not live:
            in_one_block(network)
        parts = list(zip(modules_of(source), modules_of(network), strict=True))
        self._parameters = [(theirs._parameters, ours._parameters) for theirs, ours in parts]
        self._buffers = [
            ReplaceTensor(theirs._buffers, ours._buffers, name, own.dtype, own)
            for theirs, ours in parts
            for name, own in ours._buffers.items()
            if own is not None and theirs._buffers.get(name) is not None  # not one that eval mode has made
        ]
        pairs = [(vars(theirs), vars(ours)) for theirs, ours in parts]
        self._attributes = [(t, o, k) for t, o in pairs for k, v in t.items() if isinstance(v, Tensor)]
        self._restore = Restore(network, source)
        full = replace(precision, dtype=torch.float32)
        self.engine = EagerEngine(network, full, convert=False, native=own_dtype(source))

    def follow(self) -> None:
        """Alias again what was replaced or moved in the source, and copy the rest over what the network has written."""
        self._restore()
        for theirs, ours, name in self._attributes:
            ours[name] = clone(theirs[name])
        for theirs, ours in self._parameters:
            self._follow_parameters(theirs, ours)
        for follow in self._buffers:
            follow()
        self._held()
        to_eval_mode(self.engine.network)
        if self.thawed:
            self.thaw()

    def try_out(self, arguments: Packed) -> None:
        """Raise the model's own error for this call, if it has one."""
        tensors = arguments.tensors
        with torch.no_grad(), random_state_kept(self.engine.precision.device):
            self.engine.bind(arguments)([t.clone() for t in tensors])

    def thaw(self) -> None:
        """Let weights want a gradient as the source's do, from now on: its code was seen to ask for that.

        Not for every model, because derivatives of second order would be computed for the weights as well.
        """
        self.thawed = True
        thaw(self.engine.network, self._source)

    def _follow_parameters(self, theirs: dict[str, nn.Parameter | None], ours: dict[str, nn.Parameter | None]) -> None:
        for name, parameter in theirs.items():
            own = ours[name]
            if parameter is None or own is None:
                continue
            if not self.live:
                if not write(own, parameter):
                    ours[name] = clone(parameter)  # type: ignore[assignment]
            elif not same_memory(own, parameter):
                ours[name] = alias(parameter)  # type: ignore[assignment]


def writes_parameters(
    source: nn.Module,
    precision: Precision,
    arguments: Packed,
    tensors: Sequence[Tensor],
    counting: Callable[[Sequence[Tensor]], AbstractContextManager[None]],
) -> bool | None:
    """Whether running the model changes its parameters, or buffers past their version counters, which the memo reads.

    Seen on a copy, run once on these tensors. None: it raised.

    Args:
        source: the model.
        precision: says where it is.
        arguments: of the call.
        tensors: in the place of those of the call.
        counting: makes a context for a run on these tensors.

    Raises:
        ValueError: the first forward pass adds parameters, or that of a copy writes into the model.
    """
    trial = Twin(source, precision, live=False)
    network = trial.engine.network
    comparable = [own for own in buffers_of(network) if not (own.is_quantized or own.is_meta)]
    buffers = [(own, own._version, own.clone()) for own in comparable]
    with _refusing_writes(source):
        try:
            with random_state_kept(precision.device), torch.no_grad(), counting(tensors):
                trial.engine.bind(arguments)([t.detach().clone() for t in tensors])
        except Exception as error:  # the model's own, which the run itself will raise, or one about so few samples
            if is_out_of_memory(error):
                raise
            return None
    theirs, ours = list(parameters_of(source)), list(parameters_of(network))
    if len(theirs) != len(ours):
        raise ValueError(
            "expected a model that has made all its modules, got one that makes some in its first forward pass: run "
            "the model once on an example batch"
        )
    unseen = (differ(before, own) for own, version, before in buffers if own._version == version)
    return any(map(differ, theirs, ours)) or any(unseen)


@contextmanager
def _refusing_writes(source: nn.Module) -> Iterator[None]:
    """Raise ValueError if a run of a copy writes into the model, which is left as it was: a class may list both."""
    seen = Freshness(source) if are_listed(source) else None
    with unwritten_by_copies(source):
        yield
        if seen is not None and seen.change() is not Change.NONE:
            raise ValueError(
                f"expected a model whose copies leave it as it is, for a fast model runs copies; got "
                f"{type(source).__name__}, into which a copy wrote: a class lists its objects, and a method "
                f"writes into each of them. Let the model reset its own parts, reached through self"
            )


class Written:
    """Tells whether runs of a copy write into tensors that it holds, noted by PyTorch or not, or change its parts.

    Args:
        network: the copy, before it is run.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network, self._parts = network, list(map(dict, map(_parts_of, modules_of(network))))
        self._held = [(t, t._version) for t in tensors_in(network) if not t.is_inference()]

    def unlike(self, source: nn.Module) -> bool:
        """Whether they have, as the versions tell, or the values in the model that was copied."""
        if any(t._version != before for t, before in self._held):
            return True
        if list(map(_parts_of, modules_of(self._network))) != self._parts:
            return True
        return any(map(differ, _registered(self._network), _registered(source)))


def _parts_of(module: nn.Module) -> dict[str, nn.Module | None]:
    return module._modules


def _registered(network: nn.Module) -> Iterator[Tensor]:
    return registered_in(network)
