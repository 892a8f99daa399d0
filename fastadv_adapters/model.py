"""``FastAttackModel``: a PyTorch model wrapped for fast attacks."""

import sys
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .boundary import Call, GradientStats, LossScale, Packed, pack_arguments
from .modules import (
    COMMON_ERRORS,
    HALF,
    Anchor,
    Decisions,
    EngineName,
    RunBy,
    Shell,
    accept_answer,
    accept_engine,
    accept_model,
    accept_options,
    accept_tensors,
    is_transformed,
    parameters_of,
    read_by_caller,
    refused,
    uncompiled,
)
from .networks import Kind, Networks, cured, key_of
from .report import summarise


class FastAttackModel(Shell):
    """A copy of a model that is made for what attacks do, gradients with respect to the *input*, and faster at it.

    It behaves as the wrapped model in eval mode, so attack libraries take it as it is::

        fast = FastAttackModel(model)
        adversarial = torchattacks.PGD(fast, eps=8 / 255, steps=10)(images, labels)

    Behind it are a *fast network* (batch norm folded, weights frozen, half precision, channels-last) and a
    full-precision *twin*. Every gradient passes a boundary: it scales each sample by a power of two, scales it back
    in float32, and puts 0 for entries that are not finite. The wrapped model is never changed. What is done otherwise
    than asked comes as a :class:`~fastadv_adapters.FastAttackWarning`, mostly at the first gradient pass.

    Args:
        model: any ``nn.Module`` with a floating-point tensor (N, ...) among its inputs; changes of it are followed.
        dtype: what the fast network computes in: ``torch.float16``, ``bfloat16``, ``float32``, ``float64``; or
            ``"auto"``: half precision if the device has it in hardware and, on a CPU, if products turn out to be large
            enough for it to pay in the first gradient pass; otherwise float32.
        fuse_bn: fold batch norm into the layer before it, or else make it a scale and a shift. False leaves it as it
            is, and runs PyTorch's own layers and operators, to find out whether folding or a kernel is to blame.
        channels_last: images laid out channels-last; ``"auto"``: on CPU and CUDA, if there are 2-d or 3-d convolutions.
        loss_scale: ``"per-sample"``: each sample's gradient is scaled by its own power of two where it enters half
            precision; ``"per-call"``: all by the same one; a number: by that; None: not at all.
        decisions: whose values a forward pass returns. ``"auto"``: without a gradient the plain model's classes, in
            full precision; with one the fast network's values, but the twin's while an attack of a library that is
            known runs that reads decisions off gradient passes (DeepFool, C&W, FAB, DDN, FMN, ...).
            ``"exact"``: always the twin's, with the fast network's gradients: for such attacks from elsewhere.
            ``"fast"``: always the fast network's.
        logits_dtype: dtype of floating outputs, ``torch.float32`` or ``torch.float64``. In float64 the cross entropy
            of a confident model saturates far later.
        engine: what runs the fast network: ``"eager"``, one operator after the other; ``"compile"``, as made by
            ``torch.compile`` once per input shape; ``"cudagraph"``, recorded once per shape and replayed; ``"auto"``,
            CUDA graphs on CUDA, else eager. If one cannot run the network, a simpler one does, and says so.
        auto_update: look for changes of the wrapped model before every forward pass and follow them. What cannot be
            noticed (on a GPU ``.data.mul_()``, numpy views, replayed CUDA graphs) needs :meth:`update`.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: an option of unknown value, or a model that cannot be wrapped; the text says why and what to do.
    """

    training: bool

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | Literal["auto"] = "auto",
        fuse_bn: bool = True,
        channels_last: bool | Literal["auto"] = "auto",
        loss_scale: LossScale = "per-sample",
        decisions: Decisions = "auto",
        logits_dtype: torch.dtype = torch.float32,
        engine: EngineName = "auto",
        auto_update: bool = True,
    ) -> None:
        accept_engine(engine)
        accept_options(decisions, logits_dtype, loss_scale, fuse_bn=fuse_bn, auto_update=auto_update)
        source = accept_model(model)
        super().__init__()
        self._given = {
            "dtype": dtype,
            "fuse_bn": fuse_bn,
            "channels_last": channels_last,
            "loss_scale": loss_scale,
            "engine": engine,
            "auto_update": auto_update,
        }
        with torch.inference_mode(False):
            self._networks = Networks(
                source, dtype=dtype, channels_last=channels_last, fuse_bn=fuse_bn, live=auto_update, engine=engine
            )
            self._see(decisions, logits_dtype, full_precision=False)
        self._drop_anchor(self.device)

    def _see(self, decisions: Decisions, logits_dtype: torch.dtype, *, full_precision: bool) -> None:
        self._decisions, self.training = decisions, False
        self._logits_dtype, self._full_precision = logits_dtype, full_precision

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the wrapped model in eval mode, floating ones in ``logits_dtype``.

        Args:
            *args: what the wrapped model takes, on the model's device, a floating-point tensor (N, ...) among it. (If
                gradients are disabled, integers alone will do.)
            **kwargs: likewise.

        Raises:
            TypeError: no input is a floating-point tensor, or no tensor is seen in the output.
            ValueError: an input has no batch dimension or is on another device; the model makes parameters in its first
                pass; or a library of attacks has called, and the output is not logits.
            RuntimeError: by the backward pass, if the fast model was updated in between. (Errors of the model itself
                keep their type; the common ones get the shapes of the inputs in front.)
        """
        if self._given["auto_update"] or self._networks.unfinished:
            self._networks.refresh(unasked=True)
        arguments = pack_arguments(args, kwargs)
        accept_tensors(arguments.tensors, self._networks.precision.device)
        try:
            try:
                output = self._run(arguments)
            except (RuntimeError, TypeError) as error:
                with cured(self._networks, error, self._half_kind(arguments)):
                    output = self._run(arguments)
        except Exception as error:
            if type(error) not in COMMON_ERRORS:
                raise
            told = refused(self.wrapped, arguments.tensors, error)
            raise type(error)(f"{type(self.wrapped).__name__} refused an input of shape {told}") from error
        return accept_answer(output, self.wrapped, arguments.tensors)

    def _run(self, arguments: Packed) -> Any:
        networks, tensors = self._networks, arguments.tensors
        if not networks.looked:
            with torch.inference_mode(False):
                networks.look_once(arguments, [t.requires_grad for t in tensors])
        if is_transformed(tensors):
            return networks.twin.engine.bind(arguments)(tensors).cast(self._logits_dtype).tree()
        needs = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
        with_gradient = True in needs
        key = key_of(arguments, needs)
        if with_gradient or (self._decisions == "fast" and not self._full_precision):
            networks.check_once(key, arguments, needs)
        call = self._call(key, arguments, with_gradient=with_gradient)
        if with_gradient:
            return call(tensors)
        with torch.no_grad():
            return call.values(tensors, exact=self._decisions != "fast")

    def _half_kind(self, arguments: Packed) -> Kind | None:
        needs = [torch.is_grad_enabled() and t.requires_grad for t in arguments.tensors]
        kind = self._networks.kind(key_of(arguments, needs))
        runs = (True in needs or self._decisions == "fast") and not (self._full_precision or kind.full)
        return kind if runs and kind.dtype in HALF else None

    def _call(self, key: Any, arguments: Packed, *, with_gradient: bool) -> Call:
        networks = self._networks
        kind = networks.kind(key)
        read = read_by_caller() if self._decisions == "auto" and with_gradient else ""
        full = self._full_precision or kind.full or read == "gradients"
        engine = networks.twin.engine if full else networks.engine_for(kind)
        judged = self._decisions == "auto" and not (full or with_gradient)
        scaled = self._given["loss_scale"]
        dtype = (networks.twin.engine.native if full else None) or engine.precision.dtype
        crossing = kind.crossing(networks.state, dtype, self._logits_dtype, scaled, full=full)  # type: ignore[arg-type]
        return Call(
            fast=engine.bind(arguments),
            twin=networks.judges.run(networks, key, arguments) if judged else networks.twin.engine.bind(arguments),
            exact_values=not full and (self._decisions == "exact" or bool(read)),
            crossing=crossing,
            is_current=lambda made=networks.generation: networks.generation == made,  # type: ignore[misc]
            twin_is_current=networks.twin_is_current,
            audit=None if full or kind.dtype not in HALF else partial(networks.audit, kind, arguments, crossing),
        )

    def update(self) -> "FastAttackModel":
        """Bring the fast model up to date with the wrapped model, in place; returns it.

        Changed values are folded and cast into the same storage. If modules, shapes, the device or a plain attribute
        changed, the networks are built anew. Raises ValueError if the model has become one that cannot be wrapped.
        """
        self._networks.refresh()
        return self

    def view(
        self,
        *,
        decisions: Decisions | None = None,
        logits_dtype: torch.dtype | None = None,
        full_precision: bool | None = None,
    ) -> "FastAttackModel":
        """The same fast model, sharing networks, updates and statistics, that answers differently.

        Args:
            decisions: as in the class; None keeps this one's. ValueError if any of these has no such value.
            logits_dtype: likewise.
            full_precision: whether gradients come from the twin, scaled and filtered as always; None likewise.
        """
        decisions = self._decisions if decisions is None else decisions
        logits_dtype = self._logits_dtype if logits_dtype is None else logits_dtype
        full_precision = self._full_precision if full_precision is None else full_precision
        accept_options(decisions, logits_dtype, self._given["loss_scale"], full_precision=full_precision)
        fast = _blank()
        fast.__setstate__({**self._state(), "seen": (decisions, logits_dtype, full_precision)})
        return fast

    @property
    def wrapped(self) -> nn.Module:
        """The wrapped model; of one that came in DataParallel and its kin or torch.compile, the module inside."""
        return self._networks.source

    @property
    def device(self) -> torch.device:
        """Where the wrapped model lives; move that, and the fast model follows."""
        return next(p.device for p in parameters_of(self.wrapped) if not isinstance(p, Anchor))

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions and products run in now, the widest of all calls; may change at the first gradient pass."""
        return self._networks.dtype

    @property
    def engine(self) -> RunBy:
        """``"eager"``, ``"compile"`` or ``"cudagraph"``, whichever runs the fast network now."""
        return self._networks.fast.name

    @property
    def gradient_stats(self) -> GradientStats:
        """What has passed through the boundary since the last reset; reading it waits for the device."""
        return self._networks.state.stats()

    @property
    def zero_entries(self) -> float:
        """The share of entries of all gradients since the last reset that came back as exactly 0, from 0 to 1.

        If the output is a map, this shows whether half precision loses the gradient of single pixels: compare it with
        that of ``view(full_precision=True)``, after :meth:`reset_gradient_stats`. Reading it waits for the device.
        """
        return self._networks.state.zero_entries()

    def reset_gradient_stats(self) -> None:
        """Start counting anew."""
        self._networks.state.reset_counts()

    def summary(self) -> str:
        """What was done with the model, layer by layer, or why nothing was; as text for printing."""
        seen = {"decisions": self._decisions, "logits_dtype": self._logits_dtype}
        return summarise(self._networks, {**self._given, **seen, "full_precision": self._full_precision})

    def train(self, mode: bool = True) -> "FastAttackModel":
        """Change nothing: a fast model is always in eval mode, also if a parent module is set to training.

        Raises:
            RuntimeError: a torchattacks attack asks for training mode, which would be another model than this.
        """
        if mode and sys._getframe(1).f_globals.get("__name__", "").startswith("torchattacks."):
            raise RuntimeError(
                "expected an attack on the model in eval mode, got one that sets it to training mode "
                "(set_model_training_mode(True), or LGV, which trains its model). A fast model computes the eval-mode "
                "function: leave the attack in eval mode, or give it the plain model"
            )
        return self

    def extra_repr(self) -> str:
        """Name of the wrapped class and what it runs in."""
        return f"{type(self.wrapped).__name__}, dtype={self.dtype}, device={self._networks.precision.device}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (), self._state()

    def _state(self) -> dict[str, Any]:
        """What a view shares, and a copy has its own of."""
        own = {"seen": (self._decisions, self._logits_dtype, self._full_precision), "anchor": self._anchor}
        return {"networks": self._networks, "given": self._given, "hooks": self._hooks(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        vars(self).update(state["hooks"], _given=state["given"], _networks=state["networks"])
        decisions, logits_dtype, full_precision = state["seen"]
        self._see(decisions, logits_dtype, full_precision=full_precision)
        self._drop_anchor(state["anchor"].device)  # the model may not be there yet


def _blank() -> FastAttackModel:
    """What becomes a view, or a copied or unpickled fast model, once its state is there, which may hold it again."""
    return FastAttackModel.__new__(FastAttackModel)
