"""Twin and fast network as a pair: built, checked, audited and kept fresh.

``pair`` holds both, which are built later in a copy (``building``): ``twin`` is the model itself in full precision,
``fast`` a fast network in one precision, made of a ``pattern`` where it cannot be made of the model. ``selfcheck``
asks once whether they agree, by runs of copies (``trial``, ``half``, ``coupling``) on few ``samples``, with numbers in
``blank`` norms, and by what ``nearness`` holds to be near; ``likeness`` compares a copy with the model itself.
``kinds`` keeps what is known of each kind of call, ``schedule`` when it is audited (``inputs``); ``auditing`` judges
half precision by real gradients (``audit``), which comes to a ``finding``. ``mending`` runs samples that a pass has
lost again, ``curing`` calls that raised. ``freshness`` notices changes of the model (``snapshots``), and by
``corners`` those without a record; ``trying`` surrounds runs of copies; ``remarks`` are what is said.

``judging`` answers passes without gradient by a folded network, unless ``steadiness`` finds that the model jumps,
keeps a state or draws. ``paying`` says which precision pays. Of an audit, ``audited`` is the side of the networks,
``differences`` looks at single logits, ``drawing`` at random models, ``overflowing`` at outputs that overflow;
``glimpse`` is a look that nobody waits for. ``whole`` looks whether samples see each other in larger batches only.
"""

from .curing import cured
from .kinds import Kind, key_of
from .pair import Networks
from .schedule import Schedule

__all__ = ["Kind", "Networks", "Schedule", "cured", "key_of"]
