"""Batch norms taken out of a copied network: folded into the layer before, or frozen into one scale and shift.

The copy goes on running its own code. What changes is the class of its batch norms and the tensors of its layers, so
whatever refers to a module (an attribute, a plain list, a hook) still finds it.

Folding: with s = weight / sqrt(running_var + eps), batch norm in eval mode is  s * y + (bias - s * running_mean), and
for y = W x + b that is the layer  (s W) x + (s (b - running_mean) + bias)  (Jacob et al. 2018,
https://arxiv.org/abs/1712.05877, section 3.2).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..boundary import UnbalancedFoldError, is_product, mark_ends
from ..kernels import (
    is_laid_out,
    keep_shape_only,
    lay_linear_out,
    narrow_names,
    pad_first,
    route,
    widen_group_norm,
)
from ..modules import (
    Precision,
    Restore,
    alias,
    become,
    cast_ahead_names,
    clone,
    copy_module,
    has_hooks,
    in_one_block,
    modules_of,
    named_modules_of,
    registered_in,
    submodule_of,
    tensors_in_containers,
    to_eval_mode,
)
from .centring import Centred
from .fitting import why_not
from .following import (
    CopyHeld,
    CopyTensor,
    Fold,
    FollowNorms,
    Refresh,
    ReplaceTensor,
    ScaleAndShift,
    outputs_of,
)
from .fused import fuse
from .inplace import run_in_place
from .parts import Affine, Balance, Joined, OwnCode, Skipped, count, mark, swap
from .remembering import remember
from .scales import channels_of
from .tracing import STOCK_NORMS, Trace
from .writing import parameter_like


@dataclass
class Folded:
    """A copied network after folding.

    Attributes:
        network: the copy, which computes the wrapped model's eval-mode function with its own tensors.
        refreshes: what brings its tensors up to date.
        report: name of each batch norm -> what was done with it.
        balances: name of each folded layer -> its balance: a trace shows one branch, a later call may take another.
        in_place: names of activations that run in place where their sequence of layers calls them.
        centred: names of layers out of whose bias the mean of a stream is taken.
        streams: name of the first of these in each stream -> the balances of all its layers and batch norms.
    """

    network: nn.Module
    refreshes: list[Refresh] = field(default_factory=list)
    report: dict[str, str] = field(default_factory=dict)
    balances: dict[str, Balance] = field(default_factory=dict)
    in_place: list[str] = field(default_factory=list)
    centred: list[str] = field(default_factory=list)
    streams: dict[str, list[Balance]] = field(default_factory=dict)

    def end_at(self, layers: Iterable[str]) -> None:
        """Let half precision end at these layers; products keep their weights in full precision from now on."""
        mark_ends(self.network, layers)
        for name in layers:
            part = submodule_of(self.network, name)
            if is_product(part) and not isinstance(part, Joined):
                for refresh in self.refreshes:
                    if isinstance(refresh, CopyTensor) and refresh.ours is part._parameters:
                        refresh.widen()

    def balanced(self) -> AbstractContextManager[None]:
        """Run the network inside; raises UnbalancedFoldError if a fold or a stream was not right for this run."""
        return self._weighed() if self.balances or self.streams else nullcontext()

    @contextmanager
    def _weighed(self) -> Iterator[None]:
        for balance in chain(self.balances.values(), *self.streams.values()):
            balance.more = 0
        yield
        wrong = [name for name, balance in self.balances.items() if balance.more]
        wrong += [name for name, parts in self.streams.items() if len({balance.more for balance in parts}) > 1]
        if wrong:
            raise UnbalancedFoldError(*wrong)


def build_fast(source: nn.Module, trace: Trace | None, precision: Precision, *, lays_out_ahead: bool = True) -> Folded:
    """Copy a module into a fast network.

    Args:
        source: what is copied, and followed by the refreshes; a copy in eval mode if the model goes there in its own
            way, for what its ``eval()`` computes is of all its norms, and of weights in its own dtypes.
        trace: says what folds; None folds nothing.
        precision: of the fast network.
        lays_out_ahead: whether large weights may be left in their own layout, for passes that lay them out once.
    """
    builder = _Builder(source, trace, precision, lays_out_ahead=lays_out_ahead)
    builder.treat_norms()
    builder.own_tensors()
    builder.spare_memory()
    builder.result.refreshes.append(partial(to_eval_mode, builder.result.network))
    if lays_out_ahead and (memo := remember(builder.result.network, precision)) is not None:
        builder.result.refreshes.append(memo)
    with torch.no_grad():
        in_one_block(builder.result.network)
        builder.result.refreshes.insert(0, Restore(builder.result.network, source))  # before others write
        for refresh in builder.result.refreshes:
            refresh()
    return builder.result


class _Builder:
    """One copy in the making: each part of it beside the original, by name."""

    def __init__(self, source: nn.Module, trace: Trace | None, precision: Precision, *, lays_out_ahead: bool) -> None:
        registered = set(map(id, registered_in(source)))
        held = CopyHeld(tensors_in_containers(source))
        own = lambda t: alias(t) if id(t) in registered else held.note(t, clone(t))  # noqa: E731
        network = copy_module(source, own, switches=False)
        pairs = zip(named_modules_of(source), list(modules_of(network)), strict=True)
        self.parts: dict[str, tuple[nn.Module, Any]] = {name: (part, original) for (name, original), part in pairs}
        self.trace, self.precision, self.lays_out_ahead = trace, precision, lays_out_ahead
        self.result = Folded(network, [held])
        self.remade: set[str] = set()  # layers with a weight and a bias made by a fold
        self.folds: list[Fold] = []
        self.frozen: list[tuple[_BatchNorm, ScaleAndShift]] = []

    def treat_norms(self) -> None:
        """Take every batch norm out that can be taken out."""
        if self.trace is None:
            return
        for name, (part, original) in self.parts.items():
            if isinstance(part, _BatchNorm) and isinstance(original, _BatchNorm):
                self.result.report[name] = self._treat(name, part, original, self.trace)
        if self.folds or self.frozen:
            follow = FollowNorms(self.folds, self.frozen, self.precision)
            self._centre(follow, self.trace)
            self.result.refreshes.append(follow)

    def _centre(self, follow: FollowNorms, trace: Trace) -> None:
        """Take the means out of streams whose batch norms have all been frozen."""
        parts = {id(norm): part for norm, part in follow.frozen}
        for stream in trace.streams:
            norms = {name: self.parts[name][1] for name in stream.sums}
            widths = {outputs_of(self.parts[name][1]) for name in stream.writers}
            if len(widths) > 1 or not all(
                id(norm) in parts and {channels_of(norm)} == widths for norm in norms.values()
            ):
                continue
            layers: dict[str, tuple[nn.Module, Tensor]] = {}
            for name in stream.writers:
                part, original = self.parts[name]
                own = torch.empty(*widths, dtype=self.precision.dtype, device=self.precision.device)
                part.bias = nn.Parameter(own, requires_grad=False)
                self.result.centred.append(name)
                layers[name] = (original, part.bias)
            self.result.streams[stream.writers[0]] = [count(self.parts[n][0]) for n in (*stream.writers, *norms)]
            follow.centred.append(Centred(stream, {n: (norm, parts[id(norm)]) for n, norm in norms.items()}, layers))

    def _treat(self, name: str, part: _BatchNorm, original: _BatchNorm, trace: Trace) -> str:
        """Take one batch norm out, as far as that can be done; returns what was done."""
        if part.running_mean is None or part.running_var is None:
            return "kept: it has no running statistics and normalises over the batch"
        if has_hooks(part):
            return "kept: it has hooks"
        if name in trace.unseen:
            return "kept: code that a trace does not show may read or replace its weights"
        has_own_code = type(part) not in STOCK_NORMS
        reads_first = trace.own_forward(name, part) if has_own_code else True
        if isinstance(reads_first, str):
            return f"kept: {reads_first}"
        layer_name = trace.producer.get(name)
        if layer_name is None:
            why = "no layer before it that it alone reads"
        else:
            why = why_not(layer_name, self.parts[layer_name][0], part, trace)
            why = why or ("" if reads_first else "its own forward does more with its input than the batch norm")
            if not why:
                vars(part)["balance"] = self._fold(layer_name, original)
                swap(part, None, has_own_code=has_own_code)
                return f"folded into {layer_name}"
        own: ScaleAndShift = {}  # for each dtype that its input may have; still to be filled
        self.frozen.append((original, own))
        swap(part, own, has_own_code=has_own_code)
        return f"frozen into scale and shift: {why}"

    def _fold(self, layer_name: str, norm: _BatchNorm) -> Balance:
        """Give a layer own tensors that hold it and the batch norm behind it."""
        part, original = self.parts[layer_name]
        weight: Tensor = original.weight
        own = self._empty(weight, ahead=True, spatial=not self._is_laid_out(original))
        made = part.weight = parameter_like(own, part._parameters["weight"])
        bias = torch.empty(channels_of(norm), dtype=own.dtype, device=own.device)
        part.bias = nn.Parameter(bias, requires_grad=False)
        self.folds.append(Fold(original, norm, made, part.bias))
        self.remade.add(layer_name)
        become(part, Joined)
        vars(part)["balance"] = self.result.balances[layer_name] = Balance()
        return self.result.balances[layer_name]

    def own_tensors(self) -> None:
        """Lay out all other tensors and have them followed."""
        for name, (part, original) in self.parts.items():
            if isinstance(part, (Skipped, Affine)) and not self._may_be_read(name):
                continue
            for key, value in vars(original).items():
                if isinstance(value, Tensor):
                    dtype = self.precision.dtype_for(value)
                    self.result.refreshes.append(ReplaceTensor(vars(original), vars(part), key, dtype))
            for key, buffer in original._buffers.items():
                if buffer is not None:
                    own = clone(buffer.to(self.precision.dtype_for(buffer)))
                    vars(own).update(vars(part._buffers[key]))
                    part._buffers[key] = mark(part, own) if key == "running_mean" and isinstance(part, OwnCode) else own
                    self.result.refreshes.append(CopyTensor(original._buffers, part._buffers, key))
            touched = self.trace is not None and name in self.trace.touched
            ahead = () if touched or has_hooks(original) else cast_ahead_names(original)
            ahead += () if has_hooks(original) else narrow_names(original, self.precision)
            remade = ("weight", "bias") if name in self.remade else ("bias",) * (name in self.result.centred)
            self._own_parameters(part, original, ahead, remade)

    def _may_be_read(self, name: str) -> bool:
        """Whether code other than its own forward may read the tensors of a batch norm that was taken out."""
        return self.trace is None or name in self.trace.touched or bool(self.trace.opaque)

    def spare_memory(self) -> None:
        """Keep less for the backward pass where nobody can tell the difference."""
        if self.trace is None:
            return
        for name, (part, original) in self.parts.items():
            keep_shape_only(part, type(original))
            lay_linear_out(part)
            widen_group_norm(part, self.precision.device)
            if name in self.remade and name in self.trace.rectified:
                fuse(part, self.precision)
            pad_first(part, self.precision)
        route(self.result.network, self.precision)
        names = {id(part): name for name, (part, _) in self.parts.items()}
        found = run_in_place(self.result.network)
        self.result.in_place += [names[id(activation)] for activation in found]

    def _own_parameters(
        self, part: nn.Module, original: nn.Module, ahead: tuple[str, ...], remade: tuple[str, ...]
    ) -> None:
        for name, tensor in original._parameters.items():
            if tensor is not None and name not in remade:
                spatial = isinstance(part, _ConvNd) and not self._is_laid_out(original)
                own = self._empty(tensor, ahead=name in ahead, spatial=spatial)
                part._parameters[name] = parameter_like(own, part._parameters[name])
                self.result.refreshes.append(CopyTensor(original._parameters, part._parameters, name))

    def _is_laid_out(self, layer: nn.Module) -> bool:
        return self.lays_out_ahead and is_laid_out(layer, self.precision)

    def _empty(self, tensor: Tensor, *, ahead: bool, spatial: bool) -> Tensor:
        dtype = self.precision.dtype_for(tensor, cast_ahead=ahead)
        if tensor.layout is not torch.strided:
            return clone(tensor.to(dtype))
        memory_format = self.precision.memory_format(tensor.ndim, spatial=spatial)
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, memory_format=memory_format)
