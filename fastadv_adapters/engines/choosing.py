"""Which engine runs the fast network."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import nn

from ..boundary import Engine
from ..modules import EngineName, Precision
from .compiled import CompileEngine, GiveUp
from .eager import EagerEngine
from .graphs import CudaRecorder
from .replay import ReplayEngine

AUTO_COMPILES_AFTER: int | None = None
"""After how many passes of one kind ``"auto"`` compiles what it replays on CUDA: 0 at once, None never.

What a compiled network gains inside a recording, and how long a compilation takes, has not been measured yet.
"""


def make_engine(
    name: EngineName,
    network: nn.Module,
    precision: Precision,
    *,
    around: Callable[[], AbstractContextManager[None]],
    give_up: GiveUp,
) -> Engine:
    """The engine of this name, or for ``"auto"`` the one that suits the device.

    Args:
        name: as in the option ``engine``.
        network: the fast network.
        precision: how it computes.
        around: a context for each run of its code.
        give_up: told why, once, if this engine cannot run this network, and what runs it then.
    """
    records = precision.device.type == "cuda"
    if name == "cudagraph" and not records:
        give_up(f"CUDA graphs need a model on a CUDA device, and this one is on {precision.device}")
    if name == "compile" and not records:
        return CompileEngine(network, precision, around=around, give_up=give_up)
    if name == "eager" or not records:
        return EagerEngine(network, precision, convert=True, around=around)
    compiled = None
    after = {"compile": 0, "auto": AUTO_COMPILES_AFTER}.get(name)
    if after is not None:
        compiled = CompileEngine(network, precision, around=around, give_up=partial(give_up, runs="cudagraph"))
    return ReplayEngine(
        network,
        precision,
        around=around,
        recorder=CudaRecorder(precision.device),
        give_up=give_up,
        compiled=compiled,
        compile_after=after or 0,
    )
