"""The data that a command line names: arrays in a file, a folder of images, or an object in Python."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..evaluation.data import samples_of
from ..modules import need
from .locating import called, find

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files with these endings are taken for images."""

GREY, DEEP = ("1", "L", "LA", "La"), ("I", "F")
"""Pillow's modes of images with one channel (and opacity), and how those of more than 8 bits begin."""


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images in a folder per class, as (C, H, W) within bounds; grey ones have one channel.

    Classes are in order of their names. Images of all classes come in turn, so that the first ones stand for all.
    """

    def __init__(self, path: Path, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        need("PIL.Image", extra="cli")
        self._bounds = bounds
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS) for folder in folders]
        if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
            raise ValueError(
                f"expected images in each folder of {path}, since a folder is a class, got none in {empty[0]}: take it "
                f"out"
            )
        columns = [[(file, label) for file in some] for label, some in enumerate(files)]
        self.items = [item for row in zip_longest(*columns) for item in row if item is not None]
        if not self.items:
            raise ValueError(
                f"expected a folder with a folder of images per class, got {path} without any: check --data"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        try:
            with need("PIL.Image", extra="cli").open(path) as opened:
                mode = opened.mode
                image = opened.convert("L" if mode in GREY else "RGB")
        except Exception as error:
            raise ValueError(f"expected an image, got {path}, which cannot be read ({error}): leave it out") from error
        if mode.startswith(DEEP):
            raise ValueError(
                f"expected an image of 8 bits per channel, got {path} of Pillow's mode {mode}: save it with 8 bits, or "
                f"give arrays"
            )
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return _scaled(pixels.view(image.height, image.width, -1).permute(2, 0, 1), torch.float32, self._bounds), label


def data_named(text: str, dtype: torch.dtype, bounds: tuple[float, float]) -> Any:
    """A pair of tensors, or whatever else ``evaluate`` takes.

    It is named as a file of arrays x and y, whose images become this dtype; as a folder of images; or as
    ``MODULE:DATASET``. Bytes are scaled to the bounds.
    """
    path = Path(text)
    if path.is_dir():
        return ImageFolder(path, bounds)
    if path.suffix in (".npz", ".safetensors"):
        return _of_file(path, dtype, bounds)
    if ":" not in text:
        raise ValueError(
            f"expected data as a .npz or .safetensors file, a folder of images or MODULE:DATASET, got {text!r}: "
            f"{'save x and y as one of these' if path.exists() else 'check that it is there'}"
        )
    found = find(text, "data")
    is_data = isinstance(found, (Dataset, DataLoader, tuple, list))
    return called(found, text, "data") if callable(found) and not is_data else found


def first_of(data: Any, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` samples, as ``evaluate`` reads them, as one batch."""
    samples = samples_of(data, count)
    return samples.read(range(samples.count))


def _of_file(path: Path, dtype: torch.dtype, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise ValueError(f"expected a file of data, got {path}, which is not there: check --data")
    try:
        if path.suffix == ".npz":
            with need("numpy", extra="evaluate").load(path, allow_pickle=False) as file:
                arrays = {name: torch.as_tensor(file[name]) for name in file.files if name in ("x", "y")}
                keys = list(file.files)
        else:
            arrays = need("safetensors.torch", extra="evaluate").load_file(path)
            keys = list(arrays)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"expected {path} to hold arrays, got {type(error).__name__}: {error}: write it again"
        ) from error
    if not {"x", "y"} <= set(keys):
        raise ValueError(f"expected arrays x and y in {path}, got {', '.join(keys) or 'none'}: rename them")
    x, y = arrays["x"], arrays["y"]
    _expect_images_and_labels(path, x, y)
    return _scaled(x, dtype, bounds) if x.dtype == torch.uint8 else x.to(dtype), y


def _expect_images_and_labels(path: Path, x: Tensor, y: Tensor) -> None:
    """Raise of arrays of another kind, in words for those who save files."""
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(
            f"expected x in {path} to be floating, or bytes, got {_short(x)}: save floating numbers within --bounds"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        one_hot = ", y.argmax(1) of one-hot rows" if y.ndim == 2 else ""
        raise ValueError(f"expected y in {path} to be integers, got {_short(y)}: save the classes, from 0{one_hot}")
    if x.ndim == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"expected x (N, ...) and y (N,) in {path}, got shapes {tuple(x.shape)} and {tuple(y.shape)}: save as many "
            f"labels as images"
        )


def _short(array: Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} of shape {tuple(array.shape)}"


def _scaled(pixels: Tensor, dtype: torch.dtype, bounds: tuple[float, float]) -> Tensor:
    """Bytes, as numbers from the lower to the upper bound."""
    lower, upper = bounds
    return (pixels.to(dtype) / 255 * (upper - lower) + lower).clamp(lower, upper)
