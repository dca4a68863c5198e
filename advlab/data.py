"""Images as tensors: what a batch must be, a split, and a data set.

Every data set is two uint8 tensors in memory (184 MB for CIFAR-10), never one file per image: a
batch is then one indexing operation and needs no worker processes.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from advlab.machine import torch_threads

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


def check_integer(name: str, value: object, least: int = 0) -> int:
    """Return `value` if it is an integer (no bool) from `least` on.

    Raises:
        ValueError: otherwise; calls it `name`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer from {least} on")
    return int(value)


def _kind(value: object) -> str:
    """Return what an error calls the dtype of `value`, or its type if it is no tensor."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W) as float32 in [0, 1].

    Raises:
        TypeError: if they are not uint8.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images are {_kind(images)}; to_float takes uint8 images, from 0 to 255")
    return images.float().div_(255)


def check_images(images: Tensor) -> None:
    """Check that images are what every model and attack here expects.

    Args:
        images: (N, C, H, W) float in [0, 1], N at least 1.

    Raises:
        TypeError: if they are no floats.
        ValueError: if the shape is wrong or a value is out of range; the message names the mend.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        mend = "advlab.data.to_float" if isinstance(images, Tensor) else "torch.as_tensor first"
        raise TypeError(f"images are {_kind(images)}; give a float tensor in [0, 1] ({mend})")
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
    with torch_threads(1):  # for the reason told in `forward.sharing`
        low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # written so that NaN fails it
        raise ValueError(
            f"images range from {low:.4g} to {high:.4g}; they must lie in [0, 1] and hold no NaN. "
            "Divide 8-bit images by 255, and normalise inside the model, not before it"
        )


def check_labels(labels: Tensor, images: Tensor, name: str = "labels") -> None:
    """Check that there is a class for each of `images`.

    Args:
        labels: (N,) int64 on the device of the images, none negative.
        images: (N, C, H, W).
        name: What the error calls them.

    Raises:
        TypeError: if the dtype is wrong.
        ValueError: if shape or device is wrong, or a class is negative.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        mend = f"an int64 tensor of class numbers ({name}.long())"
        if not isinstance(labels, Tensor):
            mend = f"an int64 tensor of class numbers (torch.as_tensor({name}).long())"
        elif labels.ndim == 2:
            mend = f"one class for each image ({name}.argmax(1)); a share for each is not supported"
        elif labels.is_floating_point():
            mend = "an int64 tensor of class numbers"
        raise TypeError(f"{name} are {_kind(labels)}; give {mend}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} have shape {tuple(labels.shape)} for {len(images)} images; "
            f"it must be ({len(images)},)"
        )
    if labels.device != images.device:
        raise ValueError(
            f"images are on {images.device}, {name} on {labels.device}; move one: {name}.to(...)"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"{name} hold {int(labels.min())}; classes count from 0")


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Check images and labels, as `check_images` and `check_labels` do."""
    check_images(images)
    check_labels(labels, images)


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 with their labels (N,) int64.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if there are not as many labels as images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name, found, wanted in (
            ("images", self.images, torch.uint8),
            ("labels", self.labels, torch.int64),
        ):
            if not isinstance(found, Tensor) or found.dtype != wanted:
                raise TypeError(f"a split's {name} are {_kind(found)}; they must be {wanted}")
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"a split's images are {tuple(self.images.shape)}, its labels "
                f"{tuple(self.labels.shape)}; they must be (N, C, H, W) and (N,)"
            )

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


class WithTransforms(torch.utils.data.Dataset):
    """A data set whose image and label go through `transforms` together (paper, section 6.1).

    torchvision's classification sets give their `transform` the image alone; an attack needs the
    label too.

    Args:
        pictures: Any data set of pairs (image, label), such as one of torchvision's.
        transforms: Called with both, such as a ``v2.Compose`` that ends in `FGSMTransform`.
    """

    def __init__(self, pictures: Any, transforms: Callable[..., Any]) -> None:
        self.pictures, self.transforms = pictures, transforms

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.transforms(*self.pictures[index])


def _md5(*splits: Split) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for split in splits:
        digest.update(split.images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().data)
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
        """Return the data set with its tensors on `device`; itself, if they are there."""
        if torch.device(device) == self.train.images.device:
            return self
        return ImageData(self.spec, self.train.to(device), self.test.to(device))
