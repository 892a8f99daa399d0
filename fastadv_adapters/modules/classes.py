"""What a module is: its class, its hooks, and the module inside if it is a wrapper."""

from types import ModuleType
from typing import Any

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
ALL_HOOKS = tuple(key for key in vars(nn.Module()) if "_hooks" in key)


def become(part: nn.Module, mixin: type) -> None:
    """Change a module's class in place: whoever refers to it still finds it, and isinstance still holds."""
    part.__class__ = type(f"{mixin.__name__.strip('_')}{type(part).__name__}", (mixin, type(part)), {})


def kind_of(part: nn.Module) -> type[nn.Module]:
    """The class that a module had before :func:`become`."""
    package = __name__.partition(".")[0]
    return next(kind for kind in type(part).__mro__ if kind.__module__.partition(".")[0] != package)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module runs more than its forward."""
    return any(getattr(module, kind) for kind in HOOKS)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """What a module keeps of its hooks."""
    return {key: vars(module)[key] for key in ALL_HOOKS}


def inside_of(module: nn.Module) -> nn.Module | None:
    """The module inside, if this one only runs it elsewhere or otherwise (DataParallel, torch.compile); else None."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = module.module
        return inner
    compiled = getattr(module, "_orig_mod", None)  # what torch.compile keeps; its class is slow to import
    return compiled if isinstance(compiled, nn.Module) else None


def is_data(value: object) -> bool:
    """Whether an object holds data and does nothing, as a configuration."""
    if not hasattr(value, "__dict__") or callable(value) or isinstance(value, ModuleType):
        return False
    return not any(callable(item) for item in vars(value).values())
