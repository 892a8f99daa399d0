"""Which engine runs the fast network."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from ..boundary import Engine
from ..modules import EngineName, Precision
from .compiled import CompileEngine
from .eager import EagerEngine
from .graphs import CudaRecorder
from .replay import ReplayEngine


def make_engine(
    name: EngineName,
    network: nn.Module,
    precision: Precision,
    *,
    around: Callable[[], AbstractContextManager[None]],
    give_up: Callable[[str], None],
) -> Engine:
    """The engine of this name, or for ``"auto"`` the one that suits the device.

    Args:
        name: as in the option ``engine``.
        network: the fast network.
        precision: how it computes.
        around: a context for each run of its code.
        give_up: told why, once, if this engine cannot run this network; then the network runs eager.
    """
    cuda = precision.device.type == "cuda"
    if name == "compile":
        return CompileEngine(network, precision, around=around, give_up=give_up)
    if cuda and name in ("auto", "cudagraph"):
        recorder = CudaRecorder(precision.device)
        return ReplayEngine(network, precision, around=around, recorder=recorder, give_up=give_up)
    if name == "cudagraph":
        give_up(f"CUDA graphs need a model on a CUDA device, and this one is on {precision.device}")
    return EagerEngine(network, precision, convert=True, around=around)
