"""The model that a command line names, with its weights, in eval mode, on a device."""

import os
import pickle
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import first_line, need
from .locating import called, find

_NAMED = 3  # keys that are named when some do not fit
_COUNTER = "n_averaged"  # beside the weights of an AveragedModel


def device_named(name: str) -> torch.device:
    """The device of this name; ``auto``: a GPU if there is one, under torchrun the one of this process."""
    if name == "auto":
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        found = torch.cuda.is_available()
        name = f"cuda:{rank % torch.cuda.device_count()}" if found else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"expected a device that is there, got {name!r} ({first}): try cpu, or auto") from None
    return device


def model_named(target: str, weights: Path | None, device: torch.device) -> nn.Module:
    """The model that ``MODULE:FACTORY`` is or makes, on this device; without a file it keeps the weights it has."""
    made = find(target, "a model")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ValueError(
                f"expected {target} to be a model or to make one, got {type(made).__name__}: check the name"
            )
        made = called(made, target, "a model")
    if not isinstance(made, nn.Module):
        raise ValueError(f"expected {target} to make a torch.nn.Module, got {type(made).__name__}: return the model")
    if weights is not None:
        _load(made, weights)
    return made.to(device).eval()


def _load(model: nn.Module, path: Path) -> None:
    own = model.state_dict()
    state = _named_as(own, _state_in(path))
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        parts = [f"{word} {_some(keys)}" for word, keys in (("without", missing), ("with", unknown)) if keys]
        raise ValueError(
            f"expected weights with the keys of {type(model).__name__}, got {path} {' and '.join(parts)}: take the "
            f"file that was saved from this model"
        )
    for key, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != state[key].shape:
            shapes = f"{tuple(tensor.shape)}, got {tuple(state[key].shape)}"
            raise ValueError(
                f"expected {key} of shape {shapes} in {path}: take the file that was saved from this model"
            )
    model.load_state_dict(state)


def _state_in(path: Path) -> dict[str, Any]:
    """The tensors by name; a file that could run code is refused."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights, got {path}, which is not there: check --weights")
    try:
        if path.suffix == ".safetensors":
            state = need("safetensors.torch", extra="evaluate").load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it will refuse
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"expected weights and nothing else, got {path}, which is broken or holds pickled code, and is not run: "
            f"save model.state_dict()"
        ) from None
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"expected {path} to hold weights, got {first_line(error)}: save model.state_dict() again"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        kind = (
            f"a dictionary of {_some([str(key) for key in state])}" if isinstance(state, dict) else type(state).__name__
        )
        raise ValueError(
            f"expected {path} to hold a state_dict, alone or under 'state_dict', got {kind}: save "
            f"model.state_dict() alone"
        )
    return state


def _named_as(own: Collection[str], state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors without, or with, what may stand in front of all keys, as it fits the model.

    DataParallel and its kin, torch.compile and modules that train the model put it there.
    """
    named = {key: value for key, value in state.items() if key in own or key != _COUNTER}
    pairs = [(off, on) for off in _fronts(named) for on in _fronts(own)]
    ways = [{f"{on}{key.removeprefix(off)}": value for key, value in named.items()} for off, on in pairs]
    most = max(len(set(own).intersection(way)) for way in ways)  # an error then names the keys that are really missing
    return next(way for way in ways if len(set(own).intersection(way)) == most)


def _fronts(keys: Collection[str]) -> list[str]:
    """Nothing, and what all keys begin with, up to each dot."""
    first = next(iter(keys), "")
    fronts = ["", *(first[: end + 1] for end, letter in enumerate(first) if letter == ".")]
    return [front for front in fronts if all(key.startswith(front) for key in keys)]


def _some(keys: list[str]) -> str:
    named = ", ".join(keys[:_NAMED])
    return named if len(keys) <= _NAMED else f"{named} and {len(keys) - _NAMED} more"
