"""Where images come from: torchvision's data sets, a folder of pictures, or Shapes-10.

`DATASETS` declares each once. A set of torchvision's is read only after every file agrees with the
MD5 sum that torchvision knows: some of them are pickles. What was read is kept in one file in the
cache, which all processes map: its pages fill their memory once.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from advlab import files, paper, shapes
from advlab.data import DataError, DataSpec, ImageData, Split

CIFAR10_FOLDER = "cifar-10-batches-py"
NETWORK_SECONDS = 5
PICTURES = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # what Pillow may open
SIDE = 32  # pixels to which pictures are resized, unless told otherwise
SIDES = (16, 512)  # what may be told: the paper's networks halve a picture three times
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # that reads what is kept
FOLDER = re.compile(r"folder:(?P<path>.+?)(@(?P<size>\d+))?")


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set of torchvision's; a subclass for each way in which it lays out its files.

    Args:
        name: How figures and tables call it.
        torchvisions: The name of torchvision's class.
        tops: The files and folders of the set right below the root.
        papers: As in `DataSpec`.
    """

    name: str
    torchvisions: str
    tops: tuple[str, ...]
    papers: bool = False

    @property
    def kind(self) -> Any:
        """The class itself; its import takes longer than all else that opens a kept set."""
        from advlab._torchvision import datasets

        return getattr(datasets, self.torchvisions)

    def listed(self) -> list[tuple[str, str]]:
        """Return the files below the root, each with its MD5 sum."""
        raise NotImplementedError

    def read(self, root: Path, train: bool) -> tuple[Any, Any, Sequence[str]]:
        """Return images (N, C, H, W) uint8, labels and class names of a split."""
        raise NotImplementedError

    def url(self) -> str:
        """Return where torchvision downloads from."""
        return self.kind.url

    def fetch(self, folder: str) -> None:
        """Let torchvision download the set into `folder`."""
        self.kind(folder, download=True)

    def is_in(self, root: Path) -> bool:
        """Tell whether the set, or a part of it, or a link that should lead there, is in `root`."""
        return any(os.path.lexists(root / top) for top in self.tops)

    def archive_in(self, place: Path) -> Path | None:
        """Return the whole set as it is downloaded, if it is one file and lies in or at `place`.

        Raises:
            DataError: if the file is truncated or altered.
        """
        return None

    def check(self, root: Path) -> None:
        """Compare every file with its MD5 sum.

        Raises:
            DataError: if a file is missing, truncated or altered; names it and the mend.
        """
        from advlab._torchvision import check_integrity

        for path, md5 in self.listed():
            if not check_integrity(root / path, md5):
                raise self._damaged(root / path, *(root / top for top in self.tops))

    def _damaged(self, path: Path, *remove: Path) -> DataError:
        state = "is missing"
        if path.is_file():
            found = files.kind_of(path)
            state = f"is {found}" if found else "is truncated or altered (wrong MD5)"
        return DataError(
            f"{self.name} file {path} {state}; it will not be used. Delete "
            f"{' and '.join(map(str, remove))} and run again to download it, or copy an intact one "
            "there"
        )

    def load(self, key: str, root: Path) -> ImageData:
        """Return the set below `root`: what is kept of it, or its files, checked and then read.

        Raises:
            DataError: as `check`, or if a package that reads the files is missing.
        """
        found = self._kept(key, root)
        if found is None:
            self.check(root)
            found = self._decode(key, root)
            with contextlib.suppress(OSError, SafetensorError):  # where there is no cache
                self._keep(found, root)
                found = self._kept(key, root) or found
        return found

    def _decode(self, key: str, root: Path) -> ImageData:
        splits: list[Split] = []
        classes: Sequence[str] = ()
        for train in (True, False):
            try:
                images, labels, classes = self.read(root, train)
            except ImportError as error:
                raise DataError(f"{self.name} cannot be read: {error}; pip install scipy") from None
            pixels = torch.as_tensor(images).contiguous()
            splits.append(Split(pixels, torch.as_tensor(labels, dtype=torch.int64)))
        return self._as_data(key, classes, *splits)

    def _as_data(self, key: str, classes: Sequence[str], train: Split, test: Split) -> ImageData:
        channels, height, width = train.images.shape[1:]
        shape = channels, height, width
        return ImageData(DataSpec(key, self.name, shape, tuple(classes), self.papers), train, test)

    def _keep(self, data: ImageData, root: Path) -> None:
        """Write what was read from the files below `root` into one file."""
        tensors = {
            f"{name} {kind}": tensor
            for name, split in (("train", data.train), ("test", data.test))
            for kind, tensor in vars(split).items()
        }
        states = _states(root, [path for path, _ in self.listed()])
        told = {"classes": data.classes, "files": states, "seal": _seal(data, states)}
        with files.atomic_write(_kept_file(data.spec.key)) as temporary:
            save_file(tensors, temporary, {"advlab": json.dumps(told)})

    def _kept(self, key: str, root: Path) -> ImageData | None:
        """Return what is kept of the files below `root`; None where nothing is, or it is damaged.

        A write into its tensors stays in this process.
        """
        try:
            with safe_open(_kept_file(key), framework="pt") as file:
                told = json.loads(file.metadata()["advlab"])
                train, test = (
                    Split(file.get_tensor(f"{name} images"), file.get_tensor(f"{name} labels"))
                    for name in ("train", "test")
                )
            states = _states(root, [path for path, *_ in told["files"]])
            found = self._as_data(key, told["classes"], train, test)
            same = states == told["files"] and told["seal"] == _seal(found, states)
            return found if same else None
        except (DataError, SafetensorError, OSError, LookupError, TypeError, ValueError):
            return None

    def download(self, root: Path, archive: Path | None = None) -> None:
        """Download the set into `root` with torchvision, showing progress.

        It is fetched and unpacked in a folder of its own and moved when whole, so an interrupted
        download leaves nothing half done.

        Args:
            root: The folder.
            archive: The intact file that would be downloaded, where it is here already.

        Raises:
            DataError: if there is no network (within seconds) or the download fails.
        """
        host = urlsplit(self.url()).hostname or ""
        if not (archive or _reachable(host, 443 if self.url().startswith("https:") else 80)):
            raise DataError(f"{host} cannot be reached, so it cannot be downloaded")
        files.make_folder(root)
        files.make_folder(files.cache_dir())
        with (
            FileLock(files.cache_dir() / "download.lock"),  # two that want it fetch it once
            tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder,
        ):
            if self.is_in(root):
                return
            if archive:
                shutil.copy(archive, folder)  # torchvision finds it, and fetches no other
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(30)  # torchvision sets none: a stalled server would hang
            try:
                self.fetch(folder)
            except (OSError, RuntimeError) as error:
                told = f"the download of {self.name} from {host} failed: {error}"
                raise DataError(told) from error
            finally:
                socket.setdefaulttimeout(timeout)
            for top in self.tops:
                Path(folder, top).replace(root / top)


def _kept_file(key: str) -> Path:
    """Return where what was read of a set is kept; OSError where there is no cache."""
    return files.cache_dir() / "images" / f"{key}.safetensors"


def _states(root: Path, paths: Sequence[str]) -> list[list[Any]]:
    """Return what tells, without reading them, whether files below `root` are as they were."""
    found = [(path, (root / path).stat()) for path in paths]
    return [[path, state.st_size, state.st_mtime_ns] for path, state in found]


def _seal(data: ImageData, states: list[list[Any]]) -> str:
    """Return a hash of all that is kept, of the files it is from and the code that read them."""
    code = [CODE, version("torchvision")]
    sealed = repr([code, states, data.spec, len(data.train), data.md5])
    return hashlib.sha256(sealed.encode()).hexdigest()


class _Cifar(TorchvisionSet):
    def listed(self) -> list[tuple[str, str]]:
        kind = self.kind
        listed = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        return [(f"{kind.base_folder}/{name}", md5) for name, md5 in listed]

    def archive_in(self, place: Path) -> Path | None:
        from advlab._torchvision import check_integrity

        paths = [path for path in (place, place / self.kind.filename) if path.is_file()]
        paths = [path for path in paths if path.name == self.kind.filename]
        if paths and not check_integrity(paths[0], self.kind.tgz_md5):
            raise self._damaged(paths[0], paths[0])
        return paths[0] if paths else None

    def read(self, root: Path, train: bool) -> tuple[Any, Any, Sequence[str]]:
        parsed = self.kind(root, train=train, download=False)
        return torch.from_numpy(parsed.data).permute(0, 3, 1, 2), parsed.targets, parsed.classes


class _Mnist(TorchvisionSet):
    def listed(self) -> list[tuple[str, str]]:
        # The archives, which torchvision leaves beside what it unpacks: it knows no other sums.
        return [(f"{self.torchvisions}/raw/{name}", md5) for name, md5 in self.kind.resources]

    def read(self, root: Path, train: bool) -> tuple[Any, Any, Sequence[str]]:
        paths = [root / path for path, _ in self.listed()]
        images, labels = map(_read_idx, paths[:2] if train else paths[2:])
        return images[:, None], labels, self.kind.classes

    def url(self) -> str:
        return self.kind.mirrors[0]


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: a magic number with the count of axes, sizes, values."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    axes = content[3]
    sizes = [int.from_bytes(content[4 * k : 4 * k + 4], "big") for k in range(1, axes + 1)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * axes).reshape(sizes)


class _Svhn(TorchvisionSet):
    def listed(self) -> list[tuple[str, str]]:
        return [tuple(self.kind.split_list[split][1:3]) for split in ("train", "test")]

    def read(self, root: Path, train: bool) -> tuple[Any, Any, Sequence[str]]:
        parsed = self.kind(root, split="train" if train else "test", download=False)
        return parsed.data, parsed.labels, [str(digit) for digit in range(10)]

    def url(self) -> str:
        return self.kind.split_list["train"][0]

    def fetch(self, folder: str) -> None:
        for split in ("train", "test"):
            self.kind(folder, split=split, download=True)


DATASETS: dict[str, TorchvisionSet | None] = {
    "cifar10": _Cifar(paper.DATA, "CIFAR10", (CIFAR10_FOLDER,), papers=True),
    "shapes10": None,  # drawn, not read
    "fashion-mnist": _Mnist("Fashion-MNIST", "FashionMNIST", ("FashionMNIST",)),
    "mnist": _Mnist("MNIST", "MNIST", ("MNIST",)),
    "svhn": _Svhn("SVHN", "SVHN", ("train_32x32.mat", "test_32x32.mat")),
    "cifar100": _Cifar("CIFAR-100", "CIFAR100", ("cifar-100-python",)),
}


def _reachable(host: str, port: int) -> bool:
    """Tell within `NETWORK_SECONDS` whether `host` answers (a name look-up alone can hang)."""
    answered = threading.Event()

    def connect() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port), timeout=NETWORK_SECONDS),
        ):
            answered.set()

    # A daemon, so that a look-up that hangs does not keep the program from ending.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return answered.is_set()


# --- a folder of pictures


def read_picture(source: Path | bytes, shape: tuple[int, int, int]) -> Tensor:
    """Return a picture as the network sees it.

    It is turned as the camera was held; transparent parts are laid on white, grey becomes colour or
    the reverse; its central part is taken and resized.

    Args:
        source: A file, or its content.
        shape: (C, H, W) of the result.

    Returns:
        (C, H, W) uint8.

    Raises:
        ValueError: if it is no picture that Pillow reads or has 16 bits a pixel, or is to have
            neither 1 nor 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, not {channels}")
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened, formats=PICTURES) as found:
            deep = found.mode.startswith("I")  # 16 bits a pixel, which `convert` would cut off
            turned = ImageOps.exif_transpose(found).convert("RGB" if deep else "RGBA")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        kinds = f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
        raise ValueError(f"this is no {kinds} picture that can be read") from error
    if deep:
        raise ValueError("the picture has 16 bits a pixel; save it with 8")
    white = Image.new("RGBA", turned.size, "white")
    flat = Image.alpha_composite(white, turned).convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(ImageOps.fit(flat, (width, height))))
    return pixels.reshape(height, width, channels).permute(2, 0, 1)


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each class below `folder`: one folder a class, hidden ones left out."""
    found: dict[str, list[Path]] = {
        place.name: [] for place in sorted(folder.glob("[!.]*")) if place.is_dir()
    }
    for name, paths in found.items():
        for path in sorted((folder / name).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden:
                paths.append(path)
    empty = [name for name, paths in found.items() if not paths]
    if len(found) < 2 or empty:
        what = f"nothing in {', '.join(empty)}" if empty else f"{len(found)} folder(s)"
        raise DataError(
            f"{folder} has {what}; it must hold one folder of pictures for each of two classes or "
            "more (or such folders in train/ and in test/)"
        )
    return found


def _read_all(paths: Sequence[Path], labels: Sequence[int], size: int) -> Split:
    pictures, unreadable = [], []
    for path in paths:
        try:
            pictures.append(read_picture(path, (3, size, size)))
        except ValueError as error:
            unreadable.append(f"{path} ({error})")
    if unreadable:
        shown = "; ".join(unreadable[:5]) + ("; ..." if len(unreadable) > 5 else "")
        raise DataError(
            f"{len(unreadable)} of {len(paths)} files cannot be used: {shown}. Mend or remove them"
        )
    return Split(torch.stack(pictures), torch.tensor(labels))


def load_folder(folder: Path, size: int = SIDE, seed: int = 0) -> ImageData:
    """Load pictures from a folder with one folder a class.

    Args:
        folder: Holds the classes' folders, or train/ and test/ that hold them. In the first case a
            fifth of each class, chosen by `seed`, is the test split. Hidden files, and files beside
            the classes' folders, are passed over.
        size: Pixels a side to which pictures are resized (see `read_picture`).
        seed: Of the split, and of the order of the images.

    Raises:
        DataError: if there is no such folder, fewer than two classes, a class with too few
            pictures, or a file that cannot be read.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if not SIDES[0] <= size <= SIDES[1]:
        raise DataError(
            f"pictures of {size} pixels a side; choose {SIDES[0]} to {SIDES[1]}, as in "
            "folder:PATH@64"
        )
    generator = torch.Generator().manual_seed(seed)
    apart = [folder / "train", folder / "test"]
    if all(path.is_dir() for path in apart):
        parts = [_pictures(path) for path in apart]
        if parts[0].keys() != parts[1].keys():
            odd = ", ".join(sorted(parts[0].keys() ^ parts[1].keys()))
            raise DataError(f"{folder}: train and test must have the same classes; not both: {odd}")
    else:
        parts = [{}, {}]
        for name, paths in _pictures(folder).items():
            if len(paths) < 2:
                raise DataError(f"{folder / name} holds one picture; a class needs two or more")
            held = max(1, len(paths) // 5)
            mixed = [paths[k] for k in torch.randperm(len(paths), generator=generator)]
            parts[0][name], parts[1][name] = mixed[held:], mixed[:held]
    splits = []
    for part in parts:
        pairs = [(path, k) for k, own in enumerate(part.values()) for path in own]
        mixed = [pairs[k] for k in torch.randperm(len(pairs), generator=generator)]
        sources, labels = zip(*mixed, strict=True)
        splits.append(_read_all(sources, labels, size))
    key = folder_key(f"folder:{folder}@{size}")
    name = f"folder {folder.name}"  # which no other data set is called, a folder "CIFAR-10" neither
    return ImageData(DataSpec(key, name, (3, size, size), tuple(parts[0])), *splits)


# --- choosing one


def _read_set(key: str) -> TorchvisionSet:
    """Return a set that is read from files."""
    source = DATASETS[key]
    assert source is not None
    return source


def find(key: str, data_dir: str | Path | None = None) -> Path | None:
    """Return the folder that holds a set: `data_dir`, or ADVLAB_DATA; where neither is set, data/.

    The set's own folder, or one in it, may be given as well. A folder with an intact archive of the
    set alone is as good: it is unpacked into data/, the folder itself is only read.

    Raises:
        DataError: if what is given holds none, or a damaged archive; says what there is.
    """
    source, home = _read_set(key), files.home() / "data"
    given = files.setting(str(data_dir) if data_dir else None, "ADVLAB_DATA")
    place = Path(given).expanduser() if given else home
    outer = [
        up
        for one in (place.absolute(), place.resolve())
        for up in one.parents[:2]
        if any(one.is_relative_to(up / top) for top in source.tops)
    ]
    for root in (place, *outer):
        if source.is_in(root):
            return root
    if archive := source.archive_in(place):
        source.download(home, archive)
        return home
    if given:
        said = "" if given == str(data_dir) else "ADVLAB_DATA: "
        tops = " and ".join(source.tops)
        deeper = [path.parent for top in source.tops for path in place.glob(f"*/{top}")]
        mend = f"give {deeper[0]}" if deeper else "give the folder that holds it"
        if said:
            mend += f", or unset ADVLAB_DATA for {home}"
        raise DataError(f"{said}no {tops} in {place}, which {_content(place)}; {mend}")
    return None


def _content(place: Path) -> str:
    """Return what a folder that holds no data set is."""
    if not place.is_dir():
        dangling = place.is_symlink() and not place.exists()
        return "is a link to nothing" if dangling else "is no folder"
    names = sorted(path.name for path in place.iterdir() if not path.name.startswith("."))
    return f"holds {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}"


def Shapes10(train_n: int | None = None, test_n: int | None = None) -> ImageData:  # noqa: N802
    """Draw the first images of Shapes-10 (see `advlab.shapes`); 50,000 and 10,000 by default."""
    sizes = {"train": train_n, "test": test_n}
    train, test = (
        Split(*shapes.draw_shapes(split, shapes.SIZES[split] if n is None else n))
        for split, n in sizes.items()
    )
    return ImageData(DataSpec("shapes10", "Shapes-10", (3, 32, 32), shapes.CLASSES), train, test)


def asked(dataset: str | None = "auto") -> str:
    """Return the name of the data set that is asked for by `dataset`, or else by ADVLAB_DATASET.

    The path of a folder of pictures is made absolute; nothing is looked for but that.

    Raises:
        ValueError: if there is no such data set.
        DataError: if there is no such folder of pictures.
    """
    wanted = files.setting(dataset, "ADVLAB_DATASET", "auto")
    if own := FOLDER.fullmatch(wanted):
        path, size = Path(own["path"]).expanduser().absolute(), own["size"]
        if not path.is_dir():
            told = f"; for a folder {path}@{size}, add a size: @{size}@{SIDE}" if size else ""
            raise DataError(f"there is no folder {path}{told}")
        return f"folder:{path}" + (f"@{size}" if size else "")
    known = ["auto", *DATASETS]
    if wanted not in known:
        raise ValueError(f"unknown data set {wanted!r}; choose {', '.join(known)}, or folder:PATH")
    return wanted


def resolve(
    dataset: str | None = "auto", data_dir: str | Path | None = None
) -> tuple[str, Path | None]:
    """Decide which data set to use, downloading it if it is wanted and missing.

    Args:
        dataset: A key of `DATASETS`; "folder:PATH" or "folder:PATH@SIZE"; or "auto": what
            ADVLAB_DATASET says, or CIFAR-10 where it is present or can be downloaded, else
            Shapes-10.
        data_dir: Folder that holds torchvision's files; None or "auto": as in `find`.

    Returns:
        The data set, with the path of a folder made absolute, and the folder of its files; None
        where it has none.

    Raises:
        ValueError: if there is no such data set.
        DataError: if it is asked for by name and cannot be had, or as `find`.
    """
    wanted = asked(dataset)
    key = "cifar10" if wanted == "auto" else wanted
    source = DATASETS.get(key)
    if source is None:
        return key, None
    root = find(key, data_dir)
    if root is None:
        root = files.home() / "data"
        try:
            source.download(root)
        except DataError as error:
            if wanted == "auto":
                return "shapes10", None
            raise DataError(
                f"{source.name} is not here, and {error}. Set ADVLAB_DATA to the folder that holds "
                f"{' and '.join(source.tops)}, or choose the data set shapes10"
            ) from error
    return key, root


def are_papers(dataset: str) -> bool:
    """Tell whether the paper's numbers are of this data set (as `resolve` returns it)."""
    source = DATASETS.get(dataset)
    return source is not None and source.papers


def folder_key(dataset: str) -> str:
    """Return what folders of results call a data set; two folders of pictures never share one."""
    own = FOLDER.fullmatch(dataset)
    if own is None:
        return dataset
    folder, size = Path(own["path"]).resolve(), own["size"] or SIDE
    digest = hashlib.sha256(f"{folder}@{size}".encode()).hexdigest()
    return f"folder-{folder.name}-{digest[:6]}"


def load(
    dataset: str | None = "auto",
    data_dir: str | Path | None = None,
    *,
    train_n: int | None = None,
    test_n: int | None = None,
) -> ImageData:
    """Load a data set, or the first images of it.

    Args:
        dataset, data_dir: As in `resolve`.
        train_n, test_n: Images of each split at most; None for all.

    Raises:
        ValueError: if there is no such data set, or a number is below 1.
        DataError: as `resolve`, `TorchvisionSet.load` and `load_folder`.
    """
    key, root = resolve(dataset, data_dir)
    if key == "shapes10":
        return Shapes10(train_n, test_n)
    if own := FOLDER.fullmatch(key):
        whole = load_folder(Path(own["path"]), int(own["size"] or SIDE))
    else:
        assert root is not None  # only what is drawn has none
        whole = _read_set(key).load(key, root)
    if train_n is None and test_n is None:
        return whole  # with its MD5, if that is known
    train, test = (
        split.first(n if n is None else min(n, len(split)))
        for split, n in ((whole.train, train_n), (whole.test, test_n))
    )
    return ImageData(whole.spec, train, test)
