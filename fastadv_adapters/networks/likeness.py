"""Does a copy compute what the wrapped model itself does? All networks are copies: what copying breaks, all lack.

Code may compare state by identity. Hooks and classes may share containers with the model. Values may be kept beside an
instance. No comparison of one copy with another shows any of this: so the model itself is run once, on a few samples.
"""

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..engines import EagerEngine
from ..modules import (
    has_own_switch,
    holds_generator,
    in_eval_mode,
    inside_of,
    leaves_out,
    modules_of,
    own_dtype,
    put_on,
    registered_in,
    without_gradients,
)
from .nearness import Outcome, difference
from .trial import Trial

_TIMES = 4  # a model that draws in its own way may repeat itself by chance


def refuse_unlike(trial: Trial, copied: Outcome) -> None:
    """Run the wrapped model itself once, which is left as it was, and compare.

    Nothing is said of a model that refuses the call, keeps a state, has a generator, or has other outcomes from run to
    run. Nor of what would be compiled, or would train, if it ran.

    Args:
        trial: on a few samples of a call.
        copied: outcome of a copy in that trial.

    Raises:
        ValueError: the model has another outcome than its copy, or one where the copy raises.
    """
    if trial.in_half or trial.full.dtype == torch.float64:  # the copy was widened
        full = replace(trial.full, dtype=torch.float32)
        trial = Trial(trial.source, trial.arguments, trial.tensors, trial.needs, full, in_half=False)
        copied = trial.plain()
    if _is_left_alone(trial, copied):
        return
    own = _of_itself(trial)
    if isinstance(own, str) or _difference(copied, own) is None or not _repeat(trial, copied, own):
        return
    unlike = f"a copy raised {copied}" if isinstance(copied, str) else _beyond_rounding(trial, copied, own)
    if unlike is not None:
        _refuse(trial.source, unlike)


def _beyond_rounding(trial: Trial, copied: tuple[list[Tensor], list[Tensor]], own: Outcome) -> str | None:
    moved = [trial.moved(wave) for wave in (torch.cos, torch.sin)]
    return difference(own, copied, moved, who="a copy")


def _is_left_alone(trial: Trial, copied: Outcome) -> bool:
    """Whether running the model itself would change something, or tell nothing."""
    source = trial.source
    if trial.written is None or trial.written.unlike(source) or holds_generator(source) or has_own_switch(source):
        return True
    if any(map(put_on, registered_in(source))) or any(map(_is_compiled, modules_of(source))):
        return True
    return isinstance(copied, str) and leaves_out(source)  # it may be about to train


def _is_compiled(part: nn.Module) -> bool:
    """Whether running this would compile it, or have it run elsewhere."""
    held = vars(part)
    compiled = held.get("_compiled_call_impl") is not None or hasattr(held.get("forward"), "_torchdynamo_orig_callable")
    return compiled or inside_of(part) is not None


def _of_itself(trial: Trial) -> Outcome:
    with without_gradients(trial.source), in_eval_mode(trial.source):
        return trial.outcome(EagerEngine(trial.source, trial.full, convert=False, native=own_dtype(trial.source)))


def _difference(found: Outcome, reference: Outcome) -> str | None:
    if isinstance(reference, str):
        return None if isinstance(found, str) else "raised"
    return difference(found, reference)


def _repeat(trial: Trial, copied: Outcome, own: Outcome) -> bool:
    """Whether copies have the same outcome again and again, and the model itself, too."""
    pairs = ((trial.plain(), copied) if again % 2 else (_of_itself(trial), own) for again in range(2 * _TIMES))
    return all(_difference(found, before) is None for found, before in pairs)


def _refuse(source: nn.Module, unlike: str) -> NoReturn:
    raise ValueError(
        f"expected a model whose copies compute what it computes, for a fast model runs copies; got "
        f"{type(source).__name__}, of which {unlike}. A copy lacks what its code compares by identity (is, id()), what "
        f"a hook or a class keeps in a container of its own, and what is kept beside the instance. Compare by ==, and "
        f"keep in attributes of the model, reached through self, what passes read and write"
    )
