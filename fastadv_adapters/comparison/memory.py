"""How many bytes a network keeps for its backward pass, per sample and layer type."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..boundary import Packed, ends_of
from ..model import FastAttackModel
from ..modules import (
    accept_model,
    accept_tensors,
    alias,
    clone,
    copy_module,
    kind_of,
    modules_of,
    number_of_samples,
    parameters_of,
    random_state_kept,
    tensors_in,
)
from ..networks import Kind, key_of


class BytesKept(NamedTuple):
    """What a forward pass keeps for the backward pass.

    Attributes:
        total: bytes per sample.
        by_layer: class of a layer -> bytes per sample, the largest first. They add up to ``total``. Memory that several
            layers keep is counted once, for the first of them. What a module's own ``forward`` computes between its
            layers is counted for the class of that module.
    """

    total: float
    by_layer: dict[str, float]


def bytes_kept(model: nn.Module, *args: Any, **kwargs: Any) -> BytesKept:
    """Measure what one forward pass for an input gradient keeps for the backward pass.

    It runs once on a throw-away copy, in eval mode, operator after operator: nothing changes on ``model``. Each
    piece of memory counts once, whole, however many tensors are parts of it. Weights and buffers do not count; weights
    that are cast anew in every pass do, shared out over the samples. For a plain model an autocast region around the
    call is in force. What ``torch.utils.checkpoint`` and custom functions keep by themselves is not seen. A compiled
    model may keep less, for compilers compute again what they can::

        kept = bytes_kept(fast, images)
        print(kept.total / bytes_kept(model, images).total, kept.by_layer)

    Args:
        model: a plain module, with parameters that require gradients or not, or a ``FastAttackModel``, whose fast
            network is measured (brought up to date first, as before any forward pass).
        *args: what the model takes, on its device; N is the length of the first floating-point tensor among it, at
            least 1.
        **kwargs: what it takes by name.

    Returns:
        Bytes per sample, which are those of the pass divided by N.

    Raises:
        TypeError: ``model`` is not a module, or no input is a floating-point tensor.
        ValueError: an input on another device, or without samples; a model that cannot be copied.
    """
    fast = model if isinstance(model, FastAttackModel) else None
    source = accept_model(model) if fast is None else fast.wrapped
    arguments = Packed((args, kwargs))
    device = next(parameters_of(source)).device
    accept_tensors(arguments.tensors, device)
    samples = number_of_samples(arguments.tensors)
    if not samples:
        raise ValueError("expected at least one sample, got none: what is kept is counted per sample")
    counter = _Counter()
    with torch.inference_mode(False), random_state_kept(device):
        if fast is None:
            counter.run(copy_module(source, _beside), arguments, lambda t: t)
        else:
            kind = _kind_of_call(fast, arguments)
            engine = fast._networks.throw_away_copy(kind)
            ends = None if kind.full else kind.rows.ends
            with engine.precision.context(), ends_of(ends, device.type, cut=True):
                counter.run(engine.network, arguments, engine.enter)
    return counter.result(samples)


def _beside(tensor: torch.Tensor) -> torch.Tensor:
    """Its own parameters, which no forward pass writes to, and copies of all else."""
    own = alias(tensor) if isinstance(tensor, nn.Parameter) else clone(tensor)
    return own.requires_grad_(tensor.requires_grad)


def _kind_of_call(fast: FastAttackModel, arguments: Packed) -> Kind:
    networks = fast._networks
    if fast._given["auto_update"] or networks.unfinished:
        networks.refresh(unasked=True)
    needs = [t.is_floating_point() for t in arguments.tensors]
    key = key_of(arguments, needs)
    networks.check_once(key, arguments, needs)
    return networks.kind(key)


class _Counter:
    """Sums what is saved for the backward pass, by the innermost layer at work."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, for the place of a freed one may be used again
        self._working: list[str] = []
        self._bytes: dict[str, int] = {}

    def run(self, network: nn.Module, arguments: Packed, enter: Callable[[Tensor], Tensor]) -> None:
        """One forward pass of a network that nobody else uses."""
        for tensor in tensors_in(network):
            self._seen(tensor)
        for part in modules_of(network):
            part.register_forward_pre_hook(lambda module, inputs: self._working.append(kind_of(module).__name__))
            part.register_forward_hook(lambda module, inputs, output: self._leave())
        with torch.enable_grad(), saved_tensors_hooks(self._saved, lambda tensor: tensor):
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in arguments.tensors]
            inner_args, inner_kwargs = arguments.rebuild([enter(leaf) for leaf in leaves])
            network(*inner_args, **inner_kwargs)

    def result(self, samples: int) -> BytesKept:
        """What was counted."""
        ordered = sorted(self._bytes.items(), key=lambda item: -item[1])
        return BytesKept(sum(self._bytes.values()) / samples, {name: number / samples for name, number in ordered})

    def _leave(self) -> None:
        self._working.pop()

    def _saved(self, tensor: Tensor) -> Tensor:
        if not self._seen(tensor):
            name = self._working[-1] if self._working else "inputs"
            self._bytes[name] = self._bytes.get(name, 0) + tensor.untyped_storage().nbytes()
        return tensor.detach()

    def _seen(self, tensor: Tensor) -> bool:
        """Whether this tensor's memory was met before; from now on it was."""
        if tensor.layout != torch.strided:
            return True  # sparse weights and masks have no storage of their own
        storage = tensor.untyped_storage()
        known = storage._cdata in self._storages
        self._storages[storage._cdata] = storage
        return known
