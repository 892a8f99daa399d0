"""Twin and fast network as a pair: built, checked and kept fresh.

``pair`` holds both; ``twin`` is the model itself in full precision; ``selfcheck`` compares the two once, by what
``nearness`` holds to be near; ``freshness`` notices changes of the model.
"""

from .pair import Networks

__all__ = ["Networks"]
