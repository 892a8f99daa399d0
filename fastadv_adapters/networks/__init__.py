"""Twin and fast network as a pair: built, checked, audited and kept fresh.

``pair`` holds both, which are built later in a copy (``building``): ``twin`` is the model itself in full precision,
``fast`` a fast network in one precision. ``selfcheck`` asks once whether they agree, by runs of copies (``trial``,
``half``) and by what ``nearness`` holds to be near. ``kinds`` keeps what is known of each kind of call, ``schedule``
when it is audited (``inputs``); ``auditing`` judges half precision by real gradients (``audit``). ``mending`` runs
samples that a pass has lost again, ``curing`` calls that raised. ``freshness`` notices changes of
the model; ``remarks`` are what is said.
"""

from .curing import cured
from .kinds import Kind, key_of
from .pair import Networks
from .schedule import Schedule

__all__ = ["Kind", "Networks", "Schedule", "cured", "key_of"]
