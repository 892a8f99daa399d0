"""What can be asked of, and done to, any ``nn.Module``: the ground floor, which knows nothing of fast models.

``inputs`` checks what comes in from outside; ``copying`` makes copies that share only what they are told to;
``reaching_back`` says what a copy must not have, ``methods`` what code of classes names; ``rebinding`` and ``weak``
say what it has anew, ``leaving_out`` what not; ``switching`` goes to eval mode in the model's own way, and
``own_eval`` shows what that makes of it; ``lending`` leaves a model as it was; ``restoring`` takes back what its
passes leave in attributes; ``classes`` tells what a module is and changes its class in place, ``process_wide`` which
objects are not a model's; ``precision`` says how a network computes, and ``processor`` which instructions a CPU has;
``extras`` imports what only some parts need; ``holding`` finds what it holds in containers; ``layouts`` knows sparse
tensors; ``anomalies`` leaves PyTorch's anomaly mode; ``checkpoints`` runs reentrant ones otherwise;
``batch_statistics`` makes a model compute as in training mode; ``modes`` tells which parts do so by themselves;
``randomness`` keeps the random state; ``notices`` gives warnings; ``anchor`` is the parameter that tells the device,
in a ``shell`` without others; ``callers`` finds out which attack is asking, and ``answers`` whether it gets logits;
``axes`` tells which axis images lack; ``devices`` whether two are one; ``refusals`` bears that a model does not take
what it is asked beside its call; ``transforms`` sees and leaves those of ``torch.func``; ``shared`` puts back what a
trace leaves in classes and globals; ``uncompiled`` keeps ``torch.compile`` out; ``operators`` shows each operator that
runs; ``gradients`` asks for those of several outputs; ``walking`` goes through parts, parameters and buffers.
"""

from .anchor import Anchor
from .anomalies import without_anomaly_mode
from .answers import accept_answer
from .axes import lacking_axis, lone_image, refused
from .batch_statistics import with_batch_statistics
from .callers import needs_exact_gradients, read_by_caller, reads_decisions
from .checkpoints import unhooked, without_reentrant_checkpoints
from .classes import (
    are_equal,
    attributes_of,
    become,
    functions_in,
    has_hooks,
    hooks_of,
    inside_of,
    is_data,
    kind_of,
    names_in,
    put_on,
)
from .copying import alias, clone, copy_module, leaves_out, tensors_in, thaw, to_eval_mode
from .devices import same_device
from .extras import need
from .gradients import filled_gradients_of, gradients_of
from .holding import held_by, held_in, own_tensors, tensors_in_containers
from .inputs import (
    COMMON_ERRORS,
    Decisions,
    EngineName,
    RunBy,
    accept_engine,
    accept_flag,
    accept_model,
    accept_options,
    accept_tensors,
    device_of,
    first_line,
    is_out_of_memory,
    number_of_samples,
    refuse_freed,
    refuse_unfit,
)
from .layouts import differ, in_one_block, kind, last_place, pointer, same_memory, write
from .leaving_out import LeftOut, is_left_out, is_trainer
from .lending import beside_parameters, in_eval_mode, unwritten_by_copies, without_gradients, write_back
from .methods import are_listed, runs_compiled
from .modes import left_in_training
from .notices import FastAttackWarning, notify, past
from .operators import OperatorMode
from .own_eval import by_its_own_eval
from .precision import (
    HALF,
    MATRIX_LAYERS,
    Precision,
    accept_precision,
    autocast,
    cast_ahead_names,
    has_float64,
    ieee_float32,
    is_in_hardware,
    own_dtype,
    resolve,
    widen,
    widened,
    widest_on,
)
from .processor import HAS_AMX, HAS_AVX512, HAS_AVX512_BF16, HAS_FAST_MKL
from .randomness import (
    generator_states,
    holds_generator,
    host_state,
    random_state_kept,
    seed_generators,
    states_of_torch,
)
from .refusals import refusals_borne
from .restoring import Restore
from .shared import put_back
from .shell import Shell
from .switching import has_own_switch
from .transforms import is_transformed, outside_of_transforms
from .uncompiled import uncompiled
from .walking import (
    buffers_of,
    children_of,
    modules_of,
    named_buffers_of,
    named_modules_of,
    named_parameters_of,
    parameters_of,
    registered_in,
    submodule_of,
)

__all__ = [
    "COMMON_ERRORS",
    "HALF",
    "HAS_AMX",
    "HAS_AVX512",
    "HAS_AVX512_BF16",
    "HAS_FAST_MKL",
    "MATRIX_LAYERS",
    "Anchor",
    "Decisions",
    "EngineName",
    "FastAttackWarning",
    "LeftOut",
    "OperatorMode",
    "Precision",
    "Restore",
    "RunBy",
    "Shell",
    "accept_answer",
    "accept_engine",
    "accept_flag",
    "accept_model",
    "accept_options",
    "accept_precision",
    "accept_tensors",
    "alias",
    "are_equal",
    "are_listed",
    "attributes_of",
    "autocast",
    "become",
    "beside_parameters",
    "buffers_of",
    "by_its_own_eval",
    "cast_ahead_names",
    "children_of",
    "clone",
    "copy_module",
    "device_of",
    "differ",
    "filled_gradients_of",
    "first_line",
    "functions_in",
    "generator_states",
    "gradients_of",
    "has_float64",
    "has_hooks",
    "has_own_switch",
    "held_by",
    "held_in",
    "holds_generator",
    "hooks_of",
    "host_state",
    "ieee_float32",
    "in_eval_mode",
    "in_one_block",
    "inside_of",
    "is_data",
    "is_in_hardware",
    "is_left_out",
    "is_out_of_memory",
    "is_trainer",
    "is_transformed",
    "kind",
    "kind_of",
    "lacking_axis",
    "last_place",
    "leaves_out",
    "left_in_training",
    "lone_image",
    "modules_of",
    "named_buffers_of",
    "named_modules_of",
    "named_parameters_of",
    "names_in",
    "need",
    "needs_exact_gradients",
    "notify",
    "number_of_samples",
    "outside_of_transforms",
    "own_dtype",
    "own_tensors",
    "parameters_of",
    "past",
    "pointer",
    "put_back",
    "put_on",
    "random_state_kept",
    "read_by_caller",
    "reads_decisions",
    "refusals_borne",
    "refuse_freed",
    "refuse_unfit",
    "refused",
    "registered_in",
    "resolve",
    "runs_compiled",
    "same_device",
    "same_memory",
    "seed_generators",
    "states_of_torch",
    "submodule_of",
    "tensors_in",
    "tensors_in_containers",
    "thaw",
    "to_eval_mode",
    "uncompiled",
    "unhooked",
    "unwritten_by_copies",
    "widen",
    "widened",
    "widest_on",
    "with_batch_statistics",
    "without_anomaly_mode",
    "without_gradients",
    "without_reentrant_checkpoints",
    "write",
    "write_back",
]
