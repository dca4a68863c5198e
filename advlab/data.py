"""Images as tensors: what a batch must be, a split, and a data set.

Every data set is two uint8 tensors in memory (184 MB for CIFAR-10), never one file per image: a
batch is then one indexing operation and needs no worker processes.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TOLERANCE = 1e-6


class DataError(RuntimeError):
    """A data set that is missing, damaged or cannot be downloaded."""


def check_name(kind: str, name: object, known: Iterable[str]) -> None:
    """Check that there is a thing of this name.

    Args:
        kind: What the error calls it ("attack").
        name: What was asked for.
        known: The names that there are.

    Raises:
        ValueError: if there is none; says which ones there are.
    """
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W) as float32 in [0, 1]."""
    return images.float().div_(255)


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Check that images and labels are what every model, attack and table here expects.

    Args:
        images: (N, C, H, W) float in [0, 1], N at least 1.
        labels: (N,) int64 on the same device, none negative.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong or a value is out of range; the message names the mend.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {kind}; give a float tensor in [0, 1] (advlab.data.to_float)")
    shape = tuple(images.shape)
    if images.ndim != 4:
        mend = "; images[None] for one image, images[:, None] for grey ones"
        mend = mend if images.ndim == 3 else ""
        raise ValueError(f"images have shape {shape}; it must be (N, C, H, W){mend}")
    if shape[1] > 4 >= shape[3]:
        raise ValueError(
            f"images have shape {shape}; it must be (N, C, H, W), the channels before height and "
            "width: images.permute(0, 3, 1, 2)"
        )
    if images.numel() == 0:
        raise ValueError(f"the batch is empty {shape}; give at least one image")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {kind}; give an int64 tensor (labels.long())")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {len(images)} images; "
            f"it must be ({len(images)},)"
        )
    if labels.device != images.device:
        raise ValueError(
            f"images are on {images.device}, labels on {labels.device}; move one: labels.to(...)"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} is negative; labels count from 0")
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # written so that NaN fails it
        raise ValueError(
            f"images range from {low:.4g} to {high:.4g}; they must lie in [0, 1] and hold no NaN. "
            "Divide 8-bit images by 255, and normalise inside the model, not before it"
        )


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 with their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the images at `index` (int64 numbers, or a slice) as float32, and their labels."""
        if isinstance(index, slice):
            return to_float(self.images[index]), self.labels[index]
        index = index.to(self.labels.device)
        # Eight times as fast as `images[index]`.
        return to_float(self.images.index_select(0, index)), self.labels[index]

    def first(self, size: int | None) -> "Split":
        """Return the first `size` images; all of them for None.

        Raises:
            ValueError: if there are fewer than `size`, or `size` is below 1.
        """
        if size is None:
            return self
        if not 1 <= size <= len(self):
            raise ValueError(f"size is {size}; there are {len(self)} images")
        return Split(self.images[:size], self.labels[:size])

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its tensors on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


def _md5(*splits: Split) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for split in splits:
        digest.update(split.images.cpu().contiguous().numpy())
        digest.update(split.labels.cpu().numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class DataSpec:
    """What is fixed of a data set.

    Args:
        key: How the command line and folders of results call it ("cifar10").
        name: How figures and tables call it ("CIFAR-10").
        shape: (C, H, W) of an image.
        classes: Names, in the order of the labels; at least two.
        papers: Whether the paper's numbers, and the models shipped here, are of these data.
    """

    key: str
    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    papers: bool = False


@dataclass(frozen=True)
class ImageData:
    """A data set: what is fixed of it, a training and a test split.

    Raises:
        DataError: if images or labels are not as `spec` says.
    """

    spec: DataSpec
    train: Split
    test: Split

    def __post_init__(self) -> None:
        for split in (self.train, self.test):
            if split.images.shape[1:] != self.spec.shape:
                found = tuple(split.images.shape[1:])
                raise DataError(f"{self.name}: images are {found}, not {self.spec.shape}")
            for label in map(int, split.labels.aminmax()) if len(split) else ():
                if not 0 <= label < len(self.classes):
                    raise DataError(f"{self.name}: label {label} has no class name")

    @property
    def name(self) -> str:
        """How figures and tables call it."""
        return self.spec.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.spec.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.spec.shape

    @property
    def papers(self) -> bool:
        """Whether the paper's numbers are of these data."""
        return self.spec.papers

    @cached_property
    def md5(self) -> str:
        """MD5 of all pixels and labels, to tell which data a model or a table was made from."""
        return _md5(self.train, self.test)

    @cached_property
    def test_md5(self) -> str:
        """MD5 of the test split alone."""
        return _md5(self.test)

    def to(self, device: torch.device | str) -> "ImageData":
        """Return the data set with its tensors on `device`."""
        return ImageData(self.spec, self.train.to(device), self.test.to(device))
