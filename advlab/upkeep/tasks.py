"""What a worker of the cluster does: train a model, craft directions, measure, attack.

What a task needs beside the data comes to it as files, and what it makes goes back so: their
contents travel with them, unless the worker shares the disk of the machine that asks. A worker
finds the data itself. This module is light, because every worker imports it.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from distributed import get_worker
from distributed.core import Status

from advlab import checkpoints, datasets, evaluation, files, lab
from advlab.attacks import pgd
from advlab.checkpoints import Checkpoint, weights_hash
from advlab.data import DataError
from advlab.forward import holds
from advlab.lab import Lab
from advlab.machine import pick_device
from advlab.recipes import Training, file_stem
from advlab.store import Store, code_hash, key
from advlab.training import hold_out

EPOCHS = "advlab epochs"  # the topic under which workers tell how far a training is


@dataclass(frozen=True)
class Options:
    """What is asked of a run, for all its lessons and models; each as in `lab.start`."""

    profile: str = "auto"
    dataset: str = "auto"
    data_dir: str = "auto"
    output_dir: str = "auto"
    seed: int = 0
    device: str = "auto"

    def resolved(self) -> "Options":
        """Return the same with all that "auto" stands for decided, and the folders absolute.

        Raises:
            ValueError: if there is no such profile, data set or device, or the output folder is
                one of the repository's own.
            DataError: if the data cannot be had.
        """
        profile = lab.profile_name(self.profile)  # a wrong one is told before anything is done
        dataset, root = datasets.resolve(self.dataset, self.data_dir)
        output = lab.output_folder(self.output_dir, profile, dataset)
        device = pick_device(self.device)
        folder = str(root.absolute()) if root else "auto"
        return Options(profile, dataset, folder, str(output), self.seed, str(device))

    def variables(self) -> dict[str, str]:
        """Return the environment variables that tell other processes of resolved options."""
        found = {
            "ADVLAB_PROFILE": self.profile,
            "ADVLAB_DATASET": self.dataset,
            "ADVLAB_OUTPUT": self.output_dir,
            "ADVLAB_DEVICE": self.device,
        }
        return found | ({} if self.data_dir == "auto" else {"ADVLAB_DATA": self.data_dir})

    def open(self) -> Lab:
        """Open data, models and kept results of these options; the data are read once a process."""
        opened = _opened(replace(self, seed=0))
        return replace(opened, zoo=replace(opened.zoo, seed=self.seed))


@lru_cache(1)
def _opened(options: Options) -> Lab:
    return lab.start(**vars(options), progress=False)


@dataclass(frozen=True)
class Job:
    """A model that is wanted: of which run, and which."""

    options: Options
    arch: str
    training: Training

    @property
    def name(self) -> str:
        """What its file is called, without ending."""
        return file_stem(self.arch, self.training, self.options.seed)

    @property
    def key(self) -> str:
        """What no other model is called: recipes of two profiles may have the same file names."""
        return f"{self.name} of profile {self.options.profile}"


@dataclass(frozen=True)
class File:
    """A file that a task needs or has made.

    Args:
        path: Where it lies on the machine that made it.
        content: What is in it; None where `path` is good on every machine that is concerned.
    """

    path: Path
    content: bytes | None = None

    def put(self, folder: Path) -> Path:
        """Return where the file is; in `folder`, written there, if it has come from elsewhere."""
        if self.content is None:
            return self.path
        path = folder / self.path.name
        if not path.is_file() or path.read_bytes() != self.content:
            files.write_bytes(path, self.content)
        return path


def about() -> tuple[str, str]:
    """Return what must be the same on every machine: the code of this package, and torch."""
    return code_hash(), torch.__version__


def difference(theirs: tuple[str, str], ours: tuple[str, str]) -> str:
    """Return in what another machine differs, each as `about` returns it; "" for nothing."""
    named = zip(("advlab", "torch"), theirs, ours, strict=True)
    differ = [(name, one, own) for name, one, own in named if one != own]
    told = [f"another version of {name} ({one}, here {own})" for name, one, own in differ]
    return " and ".join(told)


@dataclass(frozen=True)
class Place:
    """Where tasks keep files: in the folders of whoever asks, or in their worker's own.

    Args:
        token: Name of the folder of the worker's own, the same for all runs into the same output
            folder: a later one finds there how far a training was. "" for a worker that shares
            the disk of whoever asks.
        md5: That of the data that are meant.
        asker: What `about` says on the machine that asks.
    """

    token: str
    md5: str
    asker: tuple[str, str] = field(default_factory=about)

    @property
    def folder(self) -> Path:
        """The folder of the worker's own."""
        return files.cache_dir() / "cluster" / self.token

    def open(self, options: Options) -> Lab:
        """Open what a task works with, and let it compute with one thread: a worker is a core.

        Raises:
            VersionError: if this worker, which may have come later, runs other code.
            DataError: if this machine has no such data, or others of that name.
        """
        if differs := difference(self.asker, about()):
            raise VersionError(f"whoever asks has {differs}; install the same on all machines")
        torch.set_num_threads(1)
        if not self.token:
            return options.open()
        opened = replace(options, data_dir="auto", output_dir=str(self.folder)).open()
        if opened.data.md5 != self.md5:
            raise DataError(
                f"{opened.data.name} differs here from what is asked for; copy the same files"
            )
        zoo = replace(opened.zoo, folder=self.folder / "checkpoints", shipped=None)
        return replace(opened, zoo=zoo, store=Store(self.folder / "measured"))

    def made(self, path: Path) -> File:
        """Return a file that was made here, as it goes back."""
        return File(path, path.read_bytes() if self.token else None)


def token_of(folder: Path) -> str:
    """Return the name under which workers keep what belongs to the models in `folder`."""
    path = folder / ".cluster"
    if not path.is_file():
        files.write_bytes(path, token_hex(8).encode())
    return path.read_text(encoding="utf-8")


# --- what workers are asked for


def open_data(place: Place, options: Options) -> None:
    """Read the data into this process; see `Place.open`."""
    place.open(options)


def clear(place: Place) -> None:
    """Remove the worker's own folder."""
    shutil.rmtree(place.folder, ignore_errors=True)


class VersionError(RuntimeError):
    """A worker that does not run the code of whoever asks."""


class StoppedError(RuntimeError):
    """Nobody waits for this task any longer."""


def check_wanted(what: str) -> None:
    """Raise a StoppedError that names `what` if nobody waits any longer for this task."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    gone = worker.status in (Status.closing, Status.closed, Status.failed)  # as its scheduler is
    if gone or task is None or task.state == "cancelled":
        raise StoppedError(f"{what} was called off")


def _tell(job: Job, name: str, row: dict[str, float]) -> None:
    """Tell whoever asked that an epoch is done, and stop if nobody asks any longer."""
    check_wanted(f"the training of {name}")
    images = row["epoch"] * row["seconds"] * row["images_per_second"]
    get_worker().log_event(EPOCHS, {"model": job.key, "images": images})


def train_model(place: Place, job: Job, *needs: File) -> File:
    """Train a model and return its file.

    Args:
        place: Where.
        job: Which model.
        needs: For an augmented model its baseline, and the directions of that.
    """
    zoo = place.open(job.options).zoo
    for need in needs:
        need.put(zoo.folder)
    zoo.on_epoch = partial(_tell, job)
    return place.made(zoo.get(job.arch, job.training).path)


def craft(place: Place, job: Job, baseline: File) -> File:
    """Craft the directions of a baseline; return the file that holds them."""
    zoo = place.open(job.options).zoo
    baseline.put(zoo.folder)
    zoo.directions(job.arch)
    return place.made(zoo.directions_path(job.arch))


@dataclass(frozen=True)
class _Noted(Store):
    """A store that tells what was asked of it."""

    found: dict[str, Any] = field(default_factory=dict)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        self.found[name] = super().remember(name, compute)
        return self.found[name]


def measure(
    place: Place,
    options: Options,
    targets: Sequence[File],
    sizes: Sequence[float],
    attack: str,
    source: File | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    """Measure models (see `evaluation.accuracy_table`); return what was found, by key.

    Args:
        place, options: Where, and on which data.
        targets, source: Checkpoints.
        sizes, attack: As in `accuracy_table`.
        n: Test images, the first ones; None for all.
    """
    opened = place.open(options)
    data = replace(opened.data, test=opened.data.test.first(n))
    loaded = [_load(place, file, opened.device) for file in targets]
    store = _Noted(opened.store.folder)
    maker = None if source is None else _load(place, source, opened.device)
    evaluation.accuracy_table(loaded, data, sizes, attack=attack, source=maker, store=store)
    return store.found


def judge(place: Place, job: Job, model: File) -> dict[str, Any]:
    """Ask which held-out images a model holds (see `on_held_out`); return them by key."""
    opened = place.open(job.options)
    store = _Noted(opened.store.folder)
    on_held_out(opened, _load(place, model, opened.device), store)
    return store.found


def on_held_out(opened: Lab, checkpoint: Checkpoint, store: Store) -> dict[str, list[bool]]:
    """Return which of the training images that `training.hold_out` keeps back a model has right.

    By name: "clean", and under PGD-20 at 8/255 on the loss "ce" and on the "margin".
    """
    _, held = hold_out(opened.data.train)
    images, labels = held.batch(slice(None))
    model, found = checkpoint.model, {}
    for name in ("clean", "ce", "margin"):
        on = [checkpoint.arch, weights_hash(model), images, images.device.type]

        def compute(name: str = name) -> list[bool]:
            x = images
            if name != "clean":
                x = pgd(model, images, labels, 8 / 255, alpha=1 / 255, steps=20, loss=name)
            return holds(model, x, labels).tolist()

        found[name] = store.remember(key("measurement", "held out", name, on), compute)
    return found


def _load(place: Place, file: File, device: torch.device) -> Checkpoint:
    checkpoint = checkpoints.load(file.put(place.folder / "asked"))
    checkpoint.model.to(device)
    return checkpoint
