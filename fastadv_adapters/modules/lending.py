"""A model itself in eval mode for a while, left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .copying import switches_attributes
from .layouts import differ, write
from .restoring import Restore


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model itself in eval mode for a while, as copies are; its modes and attributes are as before afterwards."""
    restore, buffers = Restore(model), []
    try:
        if model.training and switches_attributes(model):
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            with torch.no_grad():
                model.eval()
        for part in model.modules():
            part.training = False
        yield
    finally:
        restore()
        with torch.no_grad():
            for buffer, before in buffers:
                if differ(buffer, before):
                    write(buffer, before)
