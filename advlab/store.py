"""What was trained and measured, and is not computed again: one key, one place.

A result is found again only by what was asked, the weights, the data *and the code that computed
it*: whoever edits an attack or a model gets new results, never old ones under the new name.
"""

import ast
import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from advlab import files, models
from advlab.attacks import check_eps, fgsm_direction
from advlab.checkpoints import (
    Checkpoint,
    as_bytes,
    load,
    read_metadata,
    read_tensors,
    save,
    weights_hash,
)
from advlab.data import ImageData, check_name
from advlab.machine import free_threads, has_fast_bf16
from advlab.recipes import Recipe, Training, file_stem
from advlab.training import AugmentedSet, TrainingSet, fit, hold_out, measure_on_test

PACKAGE = Path(__file__).parent
_CRAFTING = ("data", "models", "forward", "attacks")
# By kind of result, the modules whose code decides it.
CODE = {
    "directions": (*_CRAFTING, "store"),
    "measurement": (*_CRAFTING, "catalogue", "evaluation"),
    "autoattack": (*_CRAFTING, "autoattack"),
    "model": (*_CRAFTING, "recipes", "training", "store"),
}
# Python 3.11's parser fails in two threads at once (python/cpython#106905).
_PARSING = Lock()


@cache
def code_hash(*modules: str, package: Path = PACKAGE) -> str:
    """Return a hash of the code of modules of a package; comments and layout do not count.

    It is that of the first call in this process: what runs is the code that was imported, whatever
    is written into the files afterwards.

    Args:
        modules: Names without "advlab."; none for all modules and rooms of the package.
        package: Its folder.
    """
    paths = [package / f"{name}.py" for name in modules] or sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    with _PARSING:
        for path in paths:
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def key(kind: str, *asked: Any) -> str:
    """Return the name under which a result is kept.

    Args:
        kind: One of `CODE`.
        asked: All that the result depends on beside code and torch: plain values, and tensors.
    """

    def plain(value: Any) -> str:
        if not isinstance(value, Tensor):
            raise TypeError(f"{value!r} cannot be part of a key")
        return hashlib.sha256(as_bytes(value)).hexdigest()

    code = code_hash(*CODE[kind], package=PACKAGE)
    identity = [kind, code, torch.__version__, asked]
    return hashlib.sha256(json.dumps(identity, default=plain).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Store:
    """Measured results, each a small file under its key: a checksum, and the result as JSON.

    Args:
        folder: Where they are kept; None keeps none.
    """

    folder: Path | None

    def find(self, name: str) -> Any:
        """Return the result called `name` (see `key`); None if no intact file holds it."""
        path = self._path(name)
        if path and path.is_file():
            checksum, _, content = path.read_bytes().partition(b"\n")
            if checksum == _checksum(content):
                return json.loads(content)
        return None

    def keep(self, name: str, result: Any) -> Any:
        """Keep a result, which is not None, under `name`; return it."""
        if path := self._path(name):
            content = json.dumps(result).encode()
            files.write_bytes(path, _checksum(content) + b"\n" + content)
        return result

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result called `name`, computing and keeping it if there is none."""
        found = self.find(name)
        return self.keep(name, compute()) if found is None else found

    def _path(self, name: str) -> Path | None:
        return self.folder / name[:2] / f"{name}.json" if self.folder else None


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


@dataclass(eq=False, repr=False)
class Zoo:
    """The trained models of one data set, recipe and seed: load what is there, train what is not.

    A checkpoint's metadata hold what it must match (see `identity`) and what was measured:
    test_accuracy, correct and n (float32, eval mode), seconds and images_per_second of the
    training, history, threads, precision, machine and versions.

    Args:
        data: The data set; all of `data.train` is trained on. Models are trained, and returned, on
            the device where it is.
        recipe: The recipe of the baselines; augmented models follow `Recipe.for_augmented_set`.
        seed: Initialisation, order and flips.
        folder: Where models trained here are kept.
        shipped: Folder that is looked at first, and never written to; None for none.
        progress: Show a tqdm bar while training.
        on_epoch: Called with a model's file stem and each epoch's figures.
    """

    data: ImageData
    recipe: Recipe
    seed: int
    folder: Path
    _: KW_ONLY
    shipped: Path | None = None
    progress: bool = True
    on_epoch: Callable[[str, dict[str, float]], None] | None = None
    _directions: dict[str, Tensor] = field(default_factory=dict, init=False)

    def identity(self, arch: str, training: Training = 0.0) -> dict[str, Any]:
        """Return what a checkpoint must say of itself to be this model."""
        check_name("architecture", arch, models.ARCHITECTURES)
        if isinstance(training, Recipe):
            recipe, train_eps = training, training.eps
        else:
            recipe = self.recipe.for_augmented_set() if training else self.recipe
            train_eps = training
        return {
            "arch": arch,
            "train_eps": check_eps(train_eps),
            "recipe": asdict(recipe),
            "seed": self.seed,
            "data": self.data.name,
            "data_md5": self.data.md5,
            "train_n": len(self.data.train),
        }

    def file_name(self, arch: str, training: Training = 0.0) -> str:
        """Return the checkpoint's file name, the same in every folder."""
        return f"{file_stem(arch, training, self.seed)}.safetensors"

    def mismatch(self, path: Path, arch: str, training: Training = 0.0) -> str:
        """Return in which fields the checkpoint at `path` is not the one asked for; "" for none.

        Raises:
            CheckpointError: if it is damaged.
        """
        found, wanted = read_metadata(path), self.identity(arch, training)
        # A file from before a recipe had all of its fields means their defaults.
        recipe = {**asdict(Recipe("", 1)), **found.get("recipe", {})}
        pairs = {name: (found.get(name), value) for name, value in wanted.items()}
        for name, value in pairs.pop("recipe")[1].items():
            pairs[f"recipe's {name}"] = recipe.get(name), value
        return ", ".join(f"{k} {a!r}, not {b!r}" for k, (a, b) in pairs.items() if a != b)

    def find(self, arch: str, training: Training = 0.0) -> Path | None:
        """Return the file of a trained model that matches in every respect, or None.

        Raises:
            CheckpointError: if a file of that name is damaged.
        """
        for folder in (self.shipped, self.folder):
            path = folder / self.file_name(arch, training) if folder else None
            if path and path.is_file() and not self.mismatch(path, arch, training):
                return path
        return None

    def why_not_shipped(self, arch: str, training: Training = 0.0) -> str:
        """Return why the shipped model cannot serve, before another is trained; "" if it can."""
        if self.shipped is None:
            return ""
        path = self.shipped / self.file_name(arch, training)
        if not path.is_file():
            return f"there is no shipped {path.name}"
        return self.mismatch(path, arch, training)

    def get(self, arch: str, training: Training = 0.0) -> Checkpoint:
        """Return a trained model, training and saving it if there is none.

        Two processes that want the same model train it once: the second waits. A training that was
        interrupted goes on from its last whole epoch.

        Args:
            arch: Name of the architecture.
            training: The training eps of the paper's defence, 0 for the baseline; or the recipe of
                an adversarial training.

        Raises:
            CheckpointError: if a file of that name is damaged.
            ValueError: if `arch` is unknown or the eps not between 0 and 1.
            OSError: if the folder cannot be written.
        """
        path = self.find(arch, training)
        if path is None:
            path = self.folder / self.file_name(arch, training)
            files.make_folder(self.folder)
            with FileLock(path.with_suffix(".lock")):
                if self.find(arch, training) is None:
                    self._train(arch, training, path)
        checkpoint = load(path)
        checkpoint.model.to(self.data.train.images.device)
        return checkpoint

    def directions(self, arch: str) -> Tensor:
        """Return the FGSM directions of the training images, int8, crafted once per architecture.

        The gradient is the baseline's, with per-image statistics, as in the paper (findings.md, 1).

        Raises:
            CheckpointError: if the file that holds them is damaged.
        """
        if arch not in self._directions:
            path = self.directions_path(arch)
            files.make_folder(self.folder)
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    self._craft(self.get(arch).model, path)
            # Of one architecture at a time, the others gone before these come: they fill 154 MB.
            self._directions.clear()
            signs = read_tensors(path)["directions"]
            self._directions[arch] = signs.to(self.data.train.images.device)
        return self._directions[arch]

    def directions_path(self, arch: str) -> Path:
        """Return the file of an architecture's directions, there or not; it needs the baseline."""
        weights = self.get(arch).metadata["weights_hash"]
        name = key("directions", weights, arch, self.data.md5)
        return self.folder / f"{arch}-directions-{name}.safetensors"

    def _craft(self, model: torch.nn.Module, path: Path) -> None:
        """Craft the directions of all training images into a file, sparing memory.

        A few images at a time, and straight to the file: the signs fill 154 MB, and each worker is
        crafting at this time.
        """
        signs = torch.empty(self.data.train.images.shape, dtype=torch.int8)
        for start in range(0, len(signs), 1_000):
            part = slice(start, start + 1_000)
            batch = self.data.train.batch(part)
            signs[part] = fgsm_direction(model, *batch, per_image_statistics=True).cpu()
        with files.atomic_write(path) as temporary:
            try:
                safetensors.torch.save_file({"directions": signs}, temporary)
            except SafetensorError as error:
                raise OSError(None, str(error)) from error

    def _train(self, arch: str, training: Training, path: Path) -> None:
        identity = self.identity(arch, training)
        recipe = Recipe(**identity["recipe"])
        train_set: TrainingSet = self.data.train
        validation = None
        if recipe.on_the_fly:
            train_set, held = hold_out(self.data.train)
            # Some of them: to attack all after each epoch would cost half of an epoch.
            validation = held.first(min(2_000, len(held)))
        elif training and not isinstance(training, Recipe):
            train_set = AugmentedSet(self.data.train, self.directions(arch), training)
        name, device = path.stem, self.data.train.images.device
        shape, classes = self.data.shape, len(self.data.classes)
        model = models.build(arch, self.seed, shape, classes).to(device)
        threads = free_threads()
        history = fit(
            model,
            train_set,
            recipe,
            seed=self.seed,
            threads=threads,
            # A curve for the baselines alone: no lesson shows one of the others.
            test=None if training else self.data.test,
            validation=validation,
            state_path=path.with_name(f"{name}-{key('model', identity)[:12]}.state"),
            progress=name if self.progress else None,
            on_epoch=partial(self.on_epoch, name) if self.on_epoch else None,
        )
        seconds = sum(row["seconds"] for row in history)
        n = len(self.data.test)
        accuracy = measure_on_test(model, self.data.test)["test_accuracy"]
        measured = {
            "shape": shape,
            "classes": classes,
            "weights_hash": weights_hash(model),
            "test_accuracy": accuracy,
            "correct": round(accuracy * n),
            "n": n,
            "history": history,
            "seconds": seconds,
            "images_per_second": len(train_set) * len(history) / seconds,
            "threads": threads,
            "precision": "bfloat16 autocast" if has_fast_bf16(device) else "float32",
            "machine": f"{platform.machine()}, {device.type}",
            "versions": {name: version(name) for name in ("advlab", "torch", "torchvision")},
        }
        save(model, {**identity, **measured}, path)
