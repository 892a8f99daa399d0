"""My model, measured: ``memory`` tells what a gradient pass keeps."""

from .memory import BytesKept, bytes_kept

__all__ = ["BytesKept", "bytes_kept"]
