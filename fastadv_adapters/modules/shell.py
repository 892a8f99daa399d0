"""A module without weights of its own, around one that has them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .anchor import Anchor
from .callers import explainer_above
from .classes import hooks_of
from .leaving_out import LeftOut


class Shell(LeftOut, nn.Module):
    """Has nothing to train, to save or to load; its device is that of the module inside, ``wrapped``.

    Hooks on it are kept so that several shells may share them.
    """

    _anchor: Anchor

    @property
    def device(self) -> torch.device:
        """Where the module inside lives."""
        raise NotImplementedError

    @property
    def wrapped(self) -> nn.Module:
        """The module inside."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is its own; AttributeError for what the module inside has, as a new head: nothing would run it."""
        own = name in vars(self) or name.startswith("_") or hasattr(type(self), name)
        if not own and hasattr(self.wrapped, name):
            raise AttributeError(
                f"expected {name} to be set on the wrapped model, which has it, got it for the fast model, which would "
                f"not use it: set it on fast.wrapped, and the fast model follows"
            )
        super().__setattr__(name, value)

    def _drop_anchor(self, device: torch.device) -> None:
        """Let libraries read the device off the parameters: of this one, empty, frozen and in no state_dict."""
        self.register_parameter("_anchor", Anchor.on(device))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """One empty, frozen parameter on the model's device: there is nothing here to train."""
        if self._anchor.device != self.device:
            self._anchor = Anchor.on(self.device)
        return super().named_parameters(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Itself alone; TypeError if that would have a library compute something else, without a word."""
        self._refuse_explainers()
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """None; TypeError likewise."""
        self._refuse_explainers()
        return super().named_children()

    def apply(self, fn: Callable[[nn.Module], None]) -> "Shell":
        """Call the function on this module alone; TypeError likewise."""
        self._refuse_explainers()
        return super().apply(fn)

    def _refuse_explainers(self) -> None:
        if library := explainer_above(sys._getframe(2)):
            raise TypeError(
                f"expected a model whose layers can be changed, which {library} does here, got a "
                f"{type(self).__name__}, which shows none: give it the plain model, fast.wrapped"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "Shell":
        # Device and dtype follow the wrapped model. A parent that is moved finds all its parameters moved.
        device = fn(self._anchor.detach()).device
        if device != self._anchor.device:
            self._anchor = Anchor.on(device)
        return self

    @property
    def _is_full_backward_hook(self) -> bool | None:
        """What PyTorch notes beside the backward hooks, which views share."""
        full: bool | None = vars(self)["_kind_of_hooks"].get("full")
        return full

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, full: bool | None) -> None:
        vars(self).setdefault("_kind_of_hooks", {})["full"] = full

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass  # a checkpoint holds the wrapped model, not its copies

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load nothing, which is all that a fast model saves.

        Raises:
            RuntimeError: there are weights; they belong into ``wrapped``.
        """
        if state_dict:
            raise RuntimeError(
                f"expected weights for the wrapped model, got {next(iter(state_dict))} for a fast model, which has "
                f"none of its own: load them with fast.wrapped.load_state_dict(), and the fast model follows"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        _, unexpected, _ = lists  # of a parent, which makes an error of them if it is strict
        unexpected += [key for key in state_dict if key.startswith(prefix)]

    def _hooks(self) -> dict[str, Any]:
        """The attributes in which PyTorch keeps the hooks of a module, to be put into another's."""
        return {**hooks_of(self), "_kind_of_hooks": vars(self)["_kind_of_hooks"]}
