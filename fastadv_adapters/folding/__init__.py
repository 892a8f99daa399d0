"""From a copy of a model to a fast network, and its tensors followed in place.

``tracing`` tells which layers fold, ``fitting`` why others do not, ``centring`` which streams have a mean to take out;
``build`` changes the copy, by the mixins in ``parts``, and ``inplace`` spares memory in it. ``following`` brings its
tensors up to date with the model's: ``scales`` computes batch norms, ``writing`` casts and lays out. ``memo`` keeps
what modules compute from weights alone (``kept`` says what a result is; ``keys`` find equal calls again;
``remembering`` says which modules), unless ``traceless`` sees writes without a record. ``own_forward`` tells what a
batch norm subclass computes. ``fused`` joins convolution and ReLU where ``rectified`` finds them (switched off).
``tracer`` is torch.fx that goes on if a module does not trace. ``reading`` tells which code may read weights where a
trace does not show it.
"""

from .build import Folded, build_fast
from .following import CopyHeld, ReplaceTensor
from .tracing import Trace, trace

__all__ = ["CopyHeld", "Folded", "ReplaceTensor", "Trace", "build_fast", "trace"]
