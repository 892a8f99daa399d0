"""What can be asked of, and done to, any ``nn.Module``: the ground floor, which knows nothing of fast models.

``inputs`` checks what comes in from outside; ``copying`` makes copies that share only what they are told to;
``classes`` tells what a module is and changes its class in place; ``precision`` says how a network computes;
``randomness`` keeps the random state; ``notices`` gives warnings; ``anchor`` is the parameter that tells the device.
"""

from .anchor import Anchor
from .classes import become, has_hooks, hooks_of, inside_of, is_data, kind_of
from .copying import alias, clone, copy_module, in_one_block, tensors_in
from .inputs import (
    COMMON_ERRORS,
    Decisions,
    EngineName,
    RunBy,
    accept_engine,
    accept_model,
    accept_options,
    accept_tensors,
    device_of,
    is_out_of_memory,
    refuse_unfit,
    shapes,
)
from .notices import FastAttackWarning, notify
from .precision import HALF, MATRIX_LAYERS, Precision, cast_ahead_names, ieee_float32, is_in_hardware, resolve
from .randomness import host_state, random_state_kept

__all__ = [
    "COMMON_ERRORS",
    "HALF",
    "MATRIX_LAYERS",
    "Anchor",
    "Decisions",
    "EngineName",
    "FastAttackWarning",
    "Precision",
    "RunBy",
    "accept_engine",
    "accept_model",
    "accept_options",
    "accept_tensors",
    "alias",
    "become",
    "cast_ahead_names",
    "clone",
    "copy_module",
    "device_of",
    "has_hooks",
    "hooks_of",
    "host_state",
    "ieee_float32",
    "in_one_block",
    "inside_of",
    "is_data",
    "is_in_hardware",
    "is_out_of_memory",
    "kind_of",
    "notify",
    "random_state_kept",
    "refuse_unfit",
    "resolve",
    "shapes",
    "tensors_in",
]
