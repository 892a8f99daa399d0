"""How a network is run: its own code (``eager``), compiled (``compiled``), or recorded and replayed (``replay``).

``choosing`` takes one of them; ``graphs`` are the CUDA graphs behind replays, and ``unchanging`` refuses to record what
would not be the same when it is replayed.
"""

from .choosing import make_engine
from .eager import EagerEngine

__all__ = ["EagerEngine", "make_engine"]
