"""Images in: CIFAR-10 through torchvision, or the built-in Shapes-10.

Every data set is two uint8 tensors in memory (184 MB for CIFAR-10), never one file per image: a
batch is then one indexing operation and needs no worker processes.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from advlab import _torchvision  # noqa: F401  (must come before torchvision)

from torchvision import datasets  # isort: skip

CIFAR10_FOLDER = datasets.CIFAR10.base_folder
TOLERANCE = 1e-6


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, 32, 32) as float32 in [0, 1]."""
    return images.float().div_(255)


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Check that images and labels are what every model, attack and table here expects.

    Args:
        images: (N, 3, 32, 32) float in [0, 1], N at least 1.
        labels: (N,) int64, none negative.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong or a value is out of range; the message names the mend.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {kind}; give a float tensor in [0, 1] (advlab.data.to_float)")
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
        raise ValueError(f"images have shape {tuple(images.shape)}; it must be (N, 3, 32, 32)")
    if len(images) == 0:
        raise ValueError("the batch is empty; give at least one image")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {kind}; give an int64 tensor (labels.long())")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {len(images)} images; "
            f"it must be ({len(images)},)"
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
    """Images (N, 3, 32, 32) uint8 with their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the images at `index` as float32 in [0, 1], and their labels."""
        return to_float(self.images[index]), self.labels[index]

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


@dataclass(frozen=True)
class ImageData:
    """A data set: its name, its class names, a training and a test split."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @cached_property
    def md5(self) -> str:
        """MD5 of all pixels and labels, to tell which data a model or a table was made from."""
        digest = hashlib.md5(usedforsecurity=False)
        for split in (self.train, self.test):
            digest.update(split.images.numpy())
            digest.update(split.labels.numpy())
        return digest.hexdigest()


def _cifar10_split(root: Path, train: bool) -> Split:
    parsed = datasets.CIFAR10(root, train=train, download=False)
    images = torch.from_numpy(parsed.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(parsed.targets))


def load_cifar10(root: Path) -> ImageData:
    """Load CIFAR-10 from the folder that holds ``cifar-10-batches-py``."""
    train, test = _cifar10_split(root, True), _cifar10_split(root, False)
    classes = ("airplane", "automobile", "bird", "cat", "deer")
    classes += ("dog", "frog", "horse", "ship", "truck")
    return ImageData("CIFAR-10", classes, train, test)
