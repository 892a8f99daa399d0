"""Any data as samples that have an index: loaders, data sets, pairs of tensors, and what can be read only once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from ..attack import accept_inputs
from ..modules import lone_image, random_state_kept
from .content import bytes_of, digest
from .lookalikes import refuse_lookalikes

AT_ONCE = 256
"""How many samples are read at once to look at them."""


@dataclass(frozen=True)
class Samples:
    """Samples by index, on the CPU or wherever they came from.

    Attributes:
        count: how many there are; their indices are 0 to ``count - 1``.
        read: indices to images (N, ...) and labels (N,).
    """

    count: int
    read: Callable[[Sequence[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Seen:
    """What a look at all samples has found.

    Attributes:
        hashes: one per image, of its values, dtype and shape.
        labels: of each.
        fingerprint: of all images and labels.
    """

    hashes: list[str]
    labels: list[int]
    fingerprint: str


def samples_of(data: Any, limit: int | None) -> Samples:
    """Samples of a DataLoader, a Dataset, a pair of tensors or an iterable of ``(x, y)``.

    A loader's data set is read in the order of its indices, so shuffling changes nothing. An iterable is read to its
    end, or up to ``limit``, and kept in memory.
    """
    refuse_lookalikes(data)
    in_batches = isinstance(data, DataLoader) and data.batch_sampler is not None
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        found = _of_tensors(*data)
    elif in_batches and not isinstance(data.dataset, IterableDataset):
        found = _of_dataset(data.dataset, _indices(data), data.collate_fn)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        found = _of_dataset(data, range(len(data)), default_collate)
    elif isinstance(data, Iterable):
        found = _of_tensors(*_collected(iter(data), limit))
    else:
        raise TypeError(
            f"expected data to be a DataLoader, a Dataset, a pair of tensors or an iterable of (x, y), got "
            f"{type(data).__name__}: pass one of these"
        )
    if found.count == 0:
        raise ValueError("expected at least one sample in data, got none: pass data with images and labels")
    return Samples(found.count if limit is None else min(limit, found.count), found.read)


def look_at(samples: Samples, bounds: tuple[float, float], classes: Callable[[Tensor], int]) -> Seen:
    """Read all samples once: check them and note who they are; errors tell the place of the first that is wrong.

    ``classes`` tells from a few images how many classes the model knows.
    """
    hashes: list[str] = []
    labels: list[int] = []
    most = 0
    for first in range(0, samples.count, AT_ONCE):
        index = range(first, min(samples.count, first + AT_ONCE))
        x, y = samples.read(index)
        try:
            largest = accept_inputs(x, y, x.device, bounds)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in samples {index[0]} to {index[-1]} of data)") from error
        most = most or classes(x[:2])
        if largest >= most:
            raise ValueError(
                f"expected labels below the number of classes, {most}, got {largest} in samples {index[0]} to "
                f"{index[-1]} of data: count labels from 0, and check that they belong to the model's task"
            )
        hashes += [hash_of(image) for image in x]
        labels += y.tolist()
    return Seen(hashes, labels, digest(repr((hashes, labels)).encode()))


def hash_of(image: Tensor) -> str:
    """A hash of the values, dtype and shape of an image."""
    return digest(repr((image.dtype, tuple(image.shape))).encode() + bytes_of(image), 8)


def _of_tensors(x: Tensor, y: Tensor) -> Samples:
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(
            f"expected as many labels as images in data, got shapes {tuple(x.shape)} and {tuple(y.shape)}: pass "
            f"(N, ...) and (N,){lone_image(x, y)}"
        )

    def read(index: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = torch.tensor(list(index), dtype=torch.int64, device="cpu")  # whatever the default device is
        return x.detach()[places.to(x.device)], y.detach()[places.to(y.device)].to(x.device)

    return Samples(len(x), read)


def _of_dataset(dataset: Any, order: Sequence[int], collate: Callable[[Any], Any]) -> Samples:
    def read(index: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = [order[i] for i in index]
        try:
            pair = collate([dataset[place] for place in places])
        except Exception as error:
            raise ValueError(
                f"expected samples {index[0]} to {index[-1]} of data to be readable, images of one shape, got "
                f"{type(error).__name__}: {error}: mend or leave out what is broken"
            ) from error
        x, y = _pair(pair)
        rows = tuple(len(part) if part.ndim else 1 for part in (x, y))
        if rows != (len(index), len(index)):
            raise ValueError(
                f"expected collate_fn to give a row for each of the {len(index)} samples {index[0]} to {index[-1]} of "
                f"data, got {rows[0]} images and {rows[1]} labels: leave samples out of the data set, not in collate_fn"
            )
        return x, y.to(x.device)  # labels of a data set are on the CPU, wherever its images are

    return Samples(len(order), read)


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    """An item of a loader or an iterable as images and labels, of one sample or of several."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        kind = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ValueError(f"expected data to give pairs (x, y), got {kind}: give images and labels alone, as tensors")
    try:
        x, y = (torch.as_tensor(part) for part in item)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = " and ".join(type(part).__name__ for part in item)
        raise ValueError(
            f"expected data to give pairs (x, y) of tensors or numbers, got {kinds} ({error}): read images before, and "
            f"make tensors of them"
        ) from error
    return x, y


def _indices(loader: DataLoader[Any]) -> Sequence[int]:
    """Which samples of its data set a loader gives, in the order of the data set: so shuffling changes nothing."""
    sampler, size = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    own_batches = type(loader.batch_sampler) is not BatchSampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size
    in_order = type(sampler) is SequentialSampler and len(sampler) == size
    if not own_batches and (shuffled or in_order or isinstance(sampler, DistributedSampler)):
        return range(size)  # of a share per process the whole, for the processes share it anew
    with random_state_kept(torch.device("cpu")):  # a sampler may draw
        own = (index for batch in loader.batch_sampler or () for index in batch)
        found = list(own if own_batches else sampler)
    partial = isinstance(sampler, RandomSampler) and not own_batches and len(found) < size
    if partial or len(set(found)) < len(found):
        raise ValueError(
            "expected a loader that gives each sample once, got one that draws samples at random: pass the data set "
            "itself, with limit=COUNT for fewer of them"
        )
    return sorted(found)


def _collected(items: Iterator[Any], limit: int | None) -> tuple[Tensor, Tensor]:
    """All samples of what can be read only once, batched or one by one."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for item in items:
        x, y = _pair(item)
        if y.ndim == 0:
            x, y = x[None], y[None]
        images.append(x.detach())
        labels.append(y.detach())
        count += len(x)
        if limit is not None and count >= limit:
            break
    if not images:
        return torch.empty(0, 1), torch.empty(0, dtype=torch.int64)
    if len({image.shape[1:] for image in images}) > 1:
        raise ValueError(
            f"expected images of one shape in data, got {sorted({tuple(i.shape[1:]) for i in images})}: resize them"
        )
    return torch.cat(images), torch.cat(labels)
