"""Trained models as files: shipped with the repository, or trained here and kept.

A checkpoint is one safetensors file (no pickle, no code). Its metadata say what it is:
architecture, training eps, recipe, seed, data (name, size, MD5), versions, the training log and the
accuracy measured on the test images. `Zoo` loads the file that matches what you ask for, or trains
it.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from advlab import files, models
from advlab.attacks import check_eps, fgsm_direction
from advlab.data import ImageData
from advlab.training import (
    AugmentedSet,
    History,
    Recipe,
    fit,
    has_fast_bf16,
    hold_out,
    measure_on_test,
    pick_device,
)

FORMAT = "advlab-1"


class CheckpointError(ValueError):
    """A weights file that is damaged, foreign or not the one asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what is known of it.

    Args:
        model: In eval mode, on the CPU.
        metadata: What the file says of itself (see `Zoo`). Foreign weights have their arch and
            weights_hash, and None for train_eps, seed and the recipe's name.
        path: The file.
    """

    model: nn.Module
    metadata: dict[str, Any]
    path: Path

    @property
    def history(self) -> History:
        """The training log, one dict per epoch (see `training.fit`)."""
        return self.metadata["history"]


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every weight and buffer of `model`: the same weights, the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def save(model: nn.Module, metadata: dict[str, Any], path: Path) -> None:
    """Write `model` and `metadata` to `path` as safetensors, atomically.

    Raises:
        OSError: if it cannot be written; the old file, if any, is left as it was.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    text = {"advlab": json.dumps({"format": FORMAT, **metadata}, sort_keys=True)}
    files.write_bytes(path, safetensors.torch.save(tensors, text))


def is_adversarial(metadata: Mapping[str, Any]) -> bool:
    """Tell whether a model was attacked anew in every batch (older files name no adversary)."""
    return metadata["recipe"].get("adversary", "fixed") != "fixed"


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises:
        CheckpointError: if the file is damaged or was not written by `save`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("advlab")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}). Delete it and get it again "
            "(git checkout for a shipped one; others are trained anew)"
        ) from error
    if text is None:
        raise CheckpointError(
            f"{path} has no advlab metadata, so it is a foreign file. To try its weights: "
            "advlab evaluate FILE --arch ARCH"
        )
    return json.loads(text)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}). Delete it and get it again "
            "(git checkout for a shipped one; others are made anew)"
        ) from error


def _load_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this architecture: {error}") from error
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise CheckpointError(f"{path} holds weights that are not finite numbers; get it again")
    return model.eval()


def load(path: Path) -> Checkpoint:
    """Load a checkpoint that `save` wrote.

    Raises:
        CheckpointError: if it is damaged, altered or foreign.
    """
    metadata = read_metadata(path)
    if metadata.get("arch") not in models.ARCHITECTURES or "weights_hash" not in metadata:
        raise CheckpointError(f"{path} does not say which architecture it is of; get it again")
    model = _load_into(models.build(metadata["arch"]), _read_tensors(path), path)
    if weights_hash(model) != metadata["weights_hash"]:
        raise CheckpointError(
            f"{path} was altered: its weights do not match the hash written at training. "
            "Delete it and get it again"
        )
    return Checkpoint(model, metadata, path)


def load_weights(path: Path, arch: str) -> Checkpoint:
    """Load any weights file, ours or a published ``.pth`` state dict, into architecture `arch`.

    Pickle files are read with ``weights_only=True``: tensors load, code does not run.

    Raises:
        CheckpointError: if the file is damaged, holds code, or does not fit `arch`.
        FileNotFoundError: if there is no such file.
    """
    model = models.build(arch)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        tensors = _read_tensors(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path} is refused: it is damaged, or a pickle that holds more than tensors and "
                "could run code. Ask its author for the state dict alone "
                "(torch.save(model.state_dict(), FILE))"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(t, Tensor) for t in tensors.values()
        ):
            raise CheckpointError(f"{path} holds no state dict (a mapping of names to tensors)")
    _load_into(model, tensors, path)
    metadata = {"arch": arch, "train_eps": None, "seed": None, "recipe": {"name": None}}
    metadata["weights_hash"] = weights_hash(model)
    return Checkpoint(model, metadata, path)


# The training eps of the paper's defence (0: the baseline), or an adversarial training's recipe.
Training = float | Recipe


def model_name(arch: str, training: Training, seed: int) -> str:
    """Return what a checkpoint's file is called, without its ending, in every folder."""
    if isinstance(training, Recipe):
        kind = training.name
    else:
        kind = f"eps{training:g}" if training else "baseline"
    return f"{arch}-{kind}-seed{seed}"


class Zoo:
    """The trained models of one data set, recipe and seed: load what is there, train what is not.

    A checkpoint's metadata hold what it must match (arch, train_eps, recipe, seed, data_md5) and
    what was measured: test_accuracy, correct and n (float32, eval mode), seconds and
    images_per_second of the training, history, threads, precision, machine and versions.

    Args:
        data: The data set; all of `data.train` is trained on.
        recipe: The recipe of the baselines; robust models follow `Recipe.for_augmented_set`.
        seed: Initialisation, order and flips.
        folder: Where models trained here are kept.
        shipped: Folder that is looked at first, and never written to; None for none.
        device: Where to train.
        progress: Show a tqdm bar while training.
    """

    def __init__(
        self,
        data: ImageData,
        recipe: Recipe,
        seed: int,
        folder: Path,
        *,
        shipped: Path | None = None,
        device: str = "auto",
        progress: bool = True,
        on_epoch: Callable[[str, dict[str, float]], None] | None = None,
    ) -> None:
        self.data, self.recipe, self.seed = data, recipe, seed
        self.folder, self.shipped = folder, shipped
        self.device, self.progress, self.on_epoch = device, progress, on_epoch
        self._directions: dict[str, Tensor] = {}

    def identity(self, arch: str, training: Training = 0.0) -> dict[str, Any]:
        """Return what a checkpoint must say of itself to be this model."""
        if arch not in models.ARCHITECTURES:
            raise ValueError(
                f"unknown architecture {arch!r}; choose one of {', '.join(models.ARCHITECTURES)}"
            )
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
        return f"{model_name(arch, training, self.seed)}.safetensors"

    def find(self, arch: str, training: Training = 0.0) -> Path | None:
        """Return the file of a trained model that matches in every respect, or None.

        Raises:
            CheckpointError: if a file of that name is damaged.
        """
        wanted = self.identity(arch, training)
        for folder in (self.shipped, self.folder):
            path = folder / self.file_name(arch, training) if folder else None
            if path and path.is_file():
                found = read_metadata(path)
                # A file from before a field existed was trained with that field's default.
                found["recipe"] = {**asdict(Recipe("", 1)), **found.get("recipe", {})}
                if all(found.get(key) == value for key, value in wanted.items()):
                    return path
        return None

    def get(self, arch: str, training: Training = 0.0) -> Checkpoint:
        """Return a trained model of `arch`, training it if it is not there.

        Args:
            arch: One of `models.ARCHITECTURES`.
            training: The training eps of the paper's defence (0: the baseline), or the recipe of an
                adversarial training.

        Two processes that ask for the same model train it once: the second waits for the first.
        """
        path = self.find(arch, training)
        if path is None:
            path = self.folder / self.file_name(arch, training)
            files.make_folder(self.folder)
            with FileLock(path.with_suffix(".lock")):
                if self.find(arch, training) is None:
                    self._train(arch, training, path)
        return load(path)

    def directions(self, arch: str) -> Tensor:
        """Return the FGSM directions of the training images, int8, crafted once per architecture.

        The gradient is the baseline's, with per-image statistics, as in the paper (findings.md, 1).
        """
        if arch not in self._directions:
            source = self.get(arch)
            path = self.folder / f"{arch}-directions-{source.metadata['weights_hash']}.safetensors"
            files.make_folder(self.folder)
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    signs = self._craft(source.model)
                    # Straight to the file: 154 MB, and each worker is crafting at this time.
                    with files.atomic_write(path) as temporary:
                        try:
                            safetensors.torch.save_file({"directions": signs}, temporary)
                        except SafetensorError as error:
                            raise OSError(None, str(error)) from error
            # Of one architecture at a time, the others gone before these come: they fill 154 MB.
            self._directions.clear()
            self._directions[arch] = _read_tensors(path)["directions"]
        return self._directions[arch]

    def _craft(self, model: nn.Module) -> Tensor:
        """Craft the directions of all training images, a few at a time to spare memory."""
        signs = torch.empty(self.data.train.images.shape, dtype=torch.int8)
        for start in range(0, len(signs), 1_000):
            part = slice(start, start + 1_000)
            batch = self.data.train.batch(part)
            signs[part] = fgsm_direction(model, *batch, per_image_statistics=True)
        return signs

    def _train(self, arch: str, training: Training, path: Path) -> None:
        identity = self.identity(arch, training)
        recipe = Recipe(**identity["recipe"])
        train_set, validation = self.data.train, None
        if recipe.on_the_fly:
            train_set, validation = hold_out(self.data.train)
        elif training:
            train_set = AugmentedSet(self.data.train, self.directions(arch), training)
        name = path.stem
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        model = models.build(arch, self.seed)
        history = fit(
            model,
            train_set,
            recipe,
            seed=self.seed,
            # A curve for the baselines alone: no lesson shows one of the others.
            test=None if training else self.data.test,
            validation=validation,
            device=self.device,
            state_path=path.with_name(f"{name}-{key}.state"),
            progress=name if self.progress else None,
            on_epoch=(lambda row: self.on_epoch(name, row)) if self.on_epoch else None,
        )
        seconds = sum(row["seconds"] for row in history)
        n = len(self.data.test)
        accuracy = measure_on_test(model, self.data.test)["test_accuracy"]
        device = pick_device(self.device)
        measured = {
            "weights_hash": weights_hash(model),
            "test_accuracy": accuracy,
            "correct": round(accuracy * n),
            "n": n,
            "history": history,
            "seconds": seconds,
            "images_per_second": len(train_set) * len(history) / seconds,
            "threads": torch.get_num_threads(),
            "precision": "bfloat16 autocast" if has_fast_bf16(device) else "float32",
            "machine": f"{platform.machine()}, {device.type}",
            "versions": {name: version(name) for name in ("advlab", "torch", "torchvision")},
        }
        save(model, {**identity, **measured}, path)
