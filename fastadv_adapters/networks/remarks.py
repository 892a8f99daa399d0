"""What is said of a network that could not be made, or run, as it was asked for."""

NOT_CHANNELS_LAST = (
    "the model runs in the contiguous layout, since channels-last it raised {} (flatten(1) or reshape() in place of "
    "view() would let it run faster)"
)
NOT_HALF = "this kind of call, and new ones, run in {}, since in {} {}"
RAISED = "this kind of call runs in float32 from now on, since in {} it raised {}"
NOT_FOLDED = "batch norm is folded into {1} layers only, since {0}"
DIFFERS = (
    "the fast network differs from the wrapped model even if nothing is folded: {} (is the model random in a way that "
    "no seed of PyTorch, Python or NumPy controls?); such calls run on the model's twin, no faster"
)
UNCHECKED = (
    "the fast network was compared with nothing, since copies of the wrapped model raised {} in the self-check; such "
    "calls run on the model's twin, no faster"
)
AUDIT = "gradients in {} are not good enough for this kind of call: {}; it runs in {} from now on"
NOT_AUDITED = "gradients could not be audited: running the model again, in full precision, raised an error"
AGAIN = "; run the attack again, for its loss was computed from these outputs"
WRITES = (
    "the model writes into its own parameters when it is run, or past PyTorch's records into its buffers: the twin has "
    "copies of parameters instead of aliases"
)
OTHER_ENGINE = "the engine is {}, since {}"
UNBALANCED = (
    "batch norm is not folded into {}, which the model also calls without that batch norm, or on inputs with other "
    "dimensions"
)
COUPLED = (
    "the gradient of one sample reaches other samples (batch norm without running statistics, or features centred "
    "over the batch): one loss scale serves the whole call instead of one per sample"
)
MODES = (
    "parts of the model are in training mode though the model is in eval mode ({}): a fast model computes the "
    "eval-mode function, which is another one"
)
SWITCHES = (
    "the model is in training mode, and its own eval() writes into its weights, or makes other layers, which a fast "
    "model leaves out: it computes another function. Call eval() on the model first (and update() after that)"
)
OLD_WEIGHTS = (
    "the weights of the wrapped model were changed where PyTorch records nothing (through .data, say): the fast model "
    "has been updated now, and attacks until then saw old weights. Call update() after such a change"
)
