"""The function that a model computes in training mode, as far as batch norm makes it another one."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .copying import clone, copy_module
from .inputs import accept_model
from .switching import has_own_switch
from .walking import modules_of


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A module on the same weights whose batch norms normalise by the batch at hand, to attack a model in training.

    ::

        fast = FastAttackModel(with_batch_statistics(model))

    Running statistics are neither used nor moved, and all else is as in eval mode (no dropout). Samples see each other,
    so what an attack finds depends on the batch, and one scale serves a call: the fast model warns of that
    (``samples-coupled``). For training only: what is deployed, and judged, is the model itself.

    Args:
        model: any ``nn.Module`` that a fast model could be made of; on its device already.

    Returns:
        A copy in eval mode that holds the model's own parameters, so it follows steps of an optimizer and whatever
        writes into them. Parameters, buffers and modules that are replaced later are not followed, nor are buffers of a
        model that has a ``train()`` or ``eval()`` of its own: make it anew.

    Raises:
        TypeError, ValueError: as of :class:`~fastadv_adapters.FastAttackModel`.
    """
    module = accept_model(model)
    shares_all = not has_own_switch(module)  # whose eval() may write into buffers, and into tensors in attributes
    copied = copy_module(module, lambda t: t if shares_all or isinstance(t, nn.Parameter) else clone(t))
    for part in modules_of(copied):
        if isinstance(part, _BatchNorm):
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
    return copied
