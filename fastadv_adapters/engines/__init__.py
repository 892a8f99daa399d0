"""How a network is run: its own code (``eager``), compiled (``compiled``), or recorded and replayed (``replay``).

``choosing`` takes one of them. ``recording`` is one kind of call, recorded; ``graphs`` are the CUDA graphs behind
replays, and ``captures`` makes one at a time. ``unchanging`` refuses to record what would not be the same when it is
replayed, and ``waiting`` what waits for the device.
"""

from .choosing import make_engine
from .compiled import GiveUp
from .eager import EagerEngine
from .unchanging import frozen_attributes

__all__ = ["EagerEngine", "GiveUp", "frozen_attributes", "make_engine"]
