"""The adapter for foolbox: models and attacks that are fast, and PGD attacks that no saturated loss makes weaker.

``models`` holds the fast ``PyTorchModel``, ``accelerating`` the attacks that make one, ``safe_steps`` PGD.

foolbox is by Rauber et al. 2020, https://doi.org/10.21105/joss.02607; eagerpy, in which its attacks are written, by
Rauber et al. 2020, https://arxiv.org/abs/2008.04175.
"""

try:
    import eagerpy  # noqa: F401
    import foolbox  # noqa: F401
except ImportError as error:
    raise ImportError(
        "expected the packages foolbox and eagerpy to be installed: pip install 'fastadv_adapters[foolbox]'"
    ) from error

from .accelerating import accelerate, suits
from .models import FastPyTorchModel
from .safe_steps import SafeL1PGD, SafeL2PGD, SafeLinfPGD

__all__ = ["FastPyTorchModel", "SafeL1PGD", "SafeL2PGD", "SafeLinfPGD", "accelerate", "suits"]
