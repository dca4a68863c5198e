"""Images in: CIFAR-10 through torchvision, or the built-in Shapes-10.

Every data set is two uint8 tensors in memory (184 MB for CIFAR-10), never one file per image: a
batch is then one indexing operation and needs no worker processes.
"""

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import torch
from filelock import FileLock
from torch import Tensor

from advlab import files, shapes
from advlab._torchvision import check_integrity, datasets

DATASETS = ("cifar10", "shapes10")
CIFAR10_FOLDER = datasets.CIFAR10.base_folder
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")
NETWORK_SECONDS = 5
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
        """Return the images at `index` (int64 numbers, or a slice) as float32, and their labels."""
        if isinstance(index, slice):
            return to_float(self.images[index]), self.labels[index]
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


def _md5(*splits: Split) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for split in splits:
        digest.update(split.images.numpy())
        digest.update(split.labels.numpy())
    return digest.hexdigest()


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
        return _md5(self.train, self.test)

    @cached_property
    def test_md5(self) -> str:
        """MD5 of the test split alone."""
        return _md5(self.test)


class DataError(RuntimeError):
    """A data set that is missing, damaged or cannot be downloaded."""


def _again(root: Path) -> str:
    return (
        f"Delete {root / CIFAR10_FOLDER} and run again to download it, or copy an intact one there"
    )


def check_files(root: Path) -> None:
    """Compare every CIFAR-10 file with torchvision's list of MD5 sums."""
    expected = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
    expected.append([datasets.CIFAR10.meta["filename"], datasets.CIFAR10.meta["md5"]])
    for name, md5 in expected:
        path = root / CIFAR10_FOLDER / name
        if not check_integrity(path, md5):
            state = "is truncated or altered (wrong MD5)" if path.is_file() else "is missing"
            raise DataError(f"CIFAR-10 file {path} {state}; it will not be used. {_again(root)}")


def load_cifar10(root: Path) -> ImageData:
    """Load CIFAR-10 from the folder that holds ``cifar-10-batches-py``.

    Every file is checked against its MD5 sum before it is read: they are pickles.

    Raises:
        DataError: if a file is missing, truncated or altered; names it and the mend.
    """
    check_files(root)
    splits = []
    for train in (True, False):
        parsed = datasets.CIFAR10(root, train=train, download=False)
        images = torch.from_numpy(parsed.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(parsed.targets)))
    return ImageData("CIFAR-10", CIFAR10_CLASSES, *splits)


def _reachable(host: str) -> bool:
    """Tell within `NETWORK_SECONDS` whether `host` answers (a name look-up alone can hang)."""
    answered = threading.Event()

    def connect() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, 443), timeout=NETWORK_SECONDS),
        ):
            answered.set()

    # A daemon, so that a look-up that hangs does not keep the program from ending.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return answered.is_set()


def download_cifar10(root: Path) -> None:
    """Download CIFAR-10 (170 MB) into `root` with torchvision, showing progress.

    It is fetched and unpacked in a folder of its own and moved when whole, so an interrupted
    download leaves nothing half done.

    Raises:
        DataError: if there is no network (within seconds) or the download fails.
    """
    host = urlsplit(datasets.CIFAR10.url).hostname or ""
    if not _reachable(host):
        raise DataError(f"{host} cannot be reached, so it cannot be downloaded")
    files.make_folder(root)
    files.make_folder(files.cache_dir())
    with (
        FileLock(files.cache_dir() / "download.lock"),  # two that want it fetch it once
        tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder,
    ):
        if (root / CIFAR10_FOLDER).is_dir():
            return
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # torchvision sets none: a stalled server would hang for ever
        try:
            datasets.CIFAR10(folder, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"the download of CIFAR-10 from {host} failed: {error}") from error
        finally:
            socket.setdefaulttimeout(timeout)
        Path(folder, CIFAR10_FOLDER).replace(root / CIFAR10_FOLDER)


def find_cifar10(data_dir: str | Path | None = None) -> Path | None:
    """Return the first folder that holds CIFAR-10: `data_dir`, or else ADVLAB_DATA, or else data/.

    Raises:
        DataError: if `data_dir` is given and holds none.
    """
    places = [data_dir] if data_dir else [os.environ.get("ADVLAB_DATA"), files.home() / "data"]
    for place in places:
        if place and (Path(place).expanduser() / CIFAR10_FOLDER).is_dir():
            return Path(place).expanduser()
    if data_dir:
        raise DataError(f"no folder {CIFAR10_FOLDER} in {data_dir}; give the folder that holds it")
    return None


def Shapes10(train_n: int | None = None, test_n: int | None = None) -> ImageData:  # noqa: N802
    """Draw the first images of Shapes-10 (see `advlab.shapes`); 50,000 and 10,000 by default."""
    sizes = {"train": train_n, "test": test_n}
    train, test = (
        Split(*shapes.draw_shapes(split, shapes.SIZES[split] if n is None else n))
        for split, n in sizes.items()
    )
    return ImageData("Shapes-10", shapes.CLASSES, train, test)


def resolve(dataset: str = "auto", data_dir: str | Path | None = None) -> tuple[str, Path | None]:
    """Decide which data set to use, downloading CIFAR-10 if it is wanted and missing.

    Args:
        dataset: "cifar10", "shapes10", or "auto": CIFAR-10 where it is present or can be
            downloaded, else Shapes-10.
        data_dir: Folder that holds CIFAR-10; None looks in ADVLAB_DATA, then data/.

    Returns:
        ("cifar10", its folder) or ("shapes10", None).

    Raises:
        ValueError: if there is no such data set.
        DataError: if "cifar10" is asked for and cannot be had.
    """
    if dataset not in ("auto", *DATASETS):
        raise ValueError(f"unknown data set {dataset!r}; choose auto, {', '.join(DATASETS)}")
    if dataset == "shapes10":
        return dataset, None
    root = find_cifar10(data_dir)
    if root is None:
        root = files.home() / "data"
        try:
            download_cifar10(root)
        except DataError as error:
            if dataset == "cifar10":
                raise DataError(
                    f"CIFAR-10 is not here, and {error}. Set ADVLAB_DATA to the folder that holds "
                    f"{CIFAR10_FOLDER}, or choose the data set shapes10"
                ) from error
            return "shapes10", None
    return "cifar10", root


def load(
    dataset: str = "auto",
    data_dir: str | Path | None = None,
    *,
    train_n: int | None = None,
    test_n: int | None = None,
) -> ImageData:
    """Load a data set, or the first images of it.

    Args:
        dataset, data_dir: As in `resolve`.
        train_n: Training images; None for all 50,000.
        test_n: Test images; None for all 10,000.

    Raises:
        ValueError: if there is no such data set or not as many images.
        DataError: as `resolve` and `load_cifar10`.
    """
    _, root = resolve(dataset, data_dir)
    if root is None:
        return Shapes10(train_n, test_n)
    whole = load_cifar10(root)
    train, test = whole.train.first(train_n), whole.test.first(test_n)
    return ImageData(whole.name, whole.classes, train, test)
