"""Trained models as files: ours with what is known of them, and other people's weights.

A checkpoint of ours is one safetensors file (no pickle, no code). Its metadata say what it is:
architecture, training eps, recipe, seed, data (name, size, MD5), versions, the training log and the
accuracy measured on the test images.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from advlab import files, models
from advlab.models import CIFAR_SHAPE
from advlab.recipes import Recipe, model_name
from advlab.training import History

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")


class CheckpointError(ValueError):
    """A weights file that is damaged, foreign or not the one asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with what is known of it.

    Args:
        model: In eval mode.
        metadata: What the file says of itself (see `store.Zoo`). Foreign weights have their arch
            and weights_hash, and None for train_eps, seed and the recipe's name.
        path: The file.
    """

    model: nn.Module
    metadata: dict[str, Any]
    path: Path

    @property
    def arch(self) -> str:
        """The architecture, a name of `models.ARCHITECTURES`."""
        return self.metadata["arch"]

    @property
    def name(self) -> str:
        """What everything calls the model (see `recipes.model_name`); the file's, if foreign."""
        if self.metadata["train_eps"] is None:
            return self.path.stem
        if is_adversarial(self.metadata):
            return model_name(self.arch, Recipe(**self.metadata["recipe"]))
        return model_name(self.arch, self.metadata["train_eps"])

    @property
    def history(self) -> History:
        """The training log, one dict per epoch (see `training.fit`)."""
        return self.metadata["history"]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the content of a tensor of any dtype (NumPy knows no bfloat16), for a hash."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every weight and buffer of `model`: the same weights, the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()[:16]


def save(model: nn.Module, metadata: dict[str, Any], path: Path) -> None:
    """Write `model` and `metadata` to `path` as safetensors, atomically.

    Raises:
        OSError: if it cannot be written; the old file, if any, is left as it was.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    text = {"advlab": json.dumps(metadata, sort_keys=True)}
    files.write_bytes(path, safetensors.torch.save(tensors, text))


def is_adversarial(metadata: Mapping[str, Any]) -> bool:
    """Tell whether each batch was attacked or made noisy (older files name no adversary)."""
    return metadata["recipe"].get("adversary", "fixed") != "fixed"


def _own_metadata(path: Path) -> dict[str, Any] | None:
    """Return what a safetensors file of ours says of itself; None for somebody else's.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("advlab")
        found = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict | None):
        raise _damaged(path, TypeError(f"its metadata are a {type(found).__name__}"))
    return found


def _damaged(path: Path, error: Exception) -> CheckpointError:
    found = files.kind_of(path) if path.is_file() else ""
    told = f"is {found}, no weights" if found else f"is damaged or no safetensors file ({error})"
    return CheckpointError(
        f"{path} {told}. Delete it and get it again (git checkout for a shipped one; others are "
        "trained anew)"
    )


def is_safetensors(path: Path) -> bool:
    """Tell whether a file is safetensors, or says so by its ending: others rename what they get."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)  # the length of a JSON text, and how that begins
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises:
        CheckpointError: if the file is damaged or was not written by `save`.
    """
    metadata = _own_metadata(path)
    if metadata is None:
        raise CheckpointError(
            f"{path} has no advlab metadata, so it is a foreign file. To try its weights: "
            "advlab evaluate FILE --arch ARCH"
        )
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in anybody's .safetensors or .pth file, by name.

    A pickle is read with ``weights_only=True``: tensors load, code does not run. What others wrap
    around a state dict (``{"state_dict": ...}``), or before every name in it ("module." of
    DataParallel, "_orig_mod." of `torch.compile`), is taken off.

    Raises:
        CheckpointError: if the file is damaged, holds code or no weights.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if is_safetensors(path):
        return _without_prefix(read_tensors(path))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is refused: it is {_unread(path, error)}") from error
    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not (isinstance(found, Mapping) and all(isinstance(t, Tensor) for t in found.values())):
        raise CheckpointError(f"{path} holds no state dict (a mapping of names to tensors)")
    return _without_prefix(dict(found))


def _unread(path: Path, error: Exception) -> str:
    """Return what a file is that `torch.load` cannot read, and the mend."""
    if found := files.kind_of(path):
        return f"{found}, no weights; get the file itself"
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip, a pickle
        return "no weights file; give one that torch.save wrote, or safetensors"
    if not isinstance(error, UnpicklingError):
        return "damaged, perhaps cut off; get it again"
    return (
        "a pickle that holds more than tensors and could run code. Ask its author for the state "
        "dict alone (torch.save(model.state_dict(), FILE))"
    )


def _without_prefix(named: dict[str, Any]) -> dict[str, Any]:
    for prefix in PREFIXES * 2:  # a compiled model in DataParallel has two
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Put weights read from `path` into `model`, and return it in eval mode.

    Raises:
        CheckpointError: if names or shapes differ (the first few are named), or a weight is no
            finite number.
    """
    wanted = model.state_dict()
    # A model may begin all of its own names so: `self.model = resnet18()`.
    own = _without_prefix({name: name for name in wanted})
    tensors = {own.get(name, name): tensor for name, tensor in tensors.items()}
    differ = {
        "missing": [name for name in wanted if name not in tensors],
        "not of this model": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in wanted
            if name in tensors and tensors[name].shape != wanted[name].shape
        ],
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in differ.items()
        if names
    ]
    if told:
        raise CheckpointError(f"{path} does not fit this architecture: weights {'; '.join(told)}")
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise CheckpointError(f"{path} holds weights that are not finite numbers; get it again")
    model.load_state_dict(tensors)
    return model.eval()


def _build(metadata: Mapping[str, Any], path: Path) -> nn.Module:
    """Return an untrained model like the one that was saved (older files are of CIFAR-10)."""
    shape, classes = metadata.get("shape", CIFAR_SHAPE), metadata.get("classes", 10)
    try:
        return models.build(str(metadata.get("arch")), shape=shape, classes=classes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not say what model it is of: {error}") from error


def load(path: Path) -> Checkpoint:
    """Load a checkpoint that `save` wrote.

    Raises:
        CheckpointError: if it is damaged, altered or foreign.
    """
    metadata = read_metadata(path)
    model = load_into(_build(metadata, path), read_tensors(path), path)
    if weights_hash(model) != metadata.get("weights_hash"):
        raise CheckpointError(
            f"{path} was altered: its weights do not match the hash written at training. "
            "Delete it and get it again"
        )
    return Checkpoint(model, metadata, path)


def load_weights(
    path: Path,
    arch: str | None = None,
    shape: tuple[int, int, int] = CIFAR_SHAPE,
    classes: int = 10,
) -> Checkpoint:
    """Load any weights file, ours or anybody's (see `read_state`), into one of our architectures.

    Args:
        path: The file.
        arch: Its architecture; may be left out where the file is ours and says it.
        shape, classes: Of the images that a foreign file was trained on.

    Raises:
        CheckpointError: if the file is damaged, holds code, does not fit `arch` or is of another
            one; or if nobody says which one it is of.
        FileNotFoundError: if there is no such file.
        ValueError: if there is no such architecture.
    """
    tensors = read_state(path)
    about = (_own_metadata(path) or {}) if is_safetensors(path) else {}
    own = about.get("arch")
    named = own or arch
    if named is None:
        raise CheckpointError(
            f"{path} does not say which architecture it is of; give --arch, one of "
            f"{', '.join(models.ARCHITECTURES)}"
        )
    if own is not None and arch not in (None, own):
        raise CheckpointError(f"{path} is of the architecture {own}, not {arch}; leave --arch out")
    built = _build(about, path) if own else models.build(named, 0, shape, classes)
    model = load_into(built, tensors, path)
    metadata = {"arch": named, "train_eps": None, "seed": None, "recipe": {"name": None}}
    metadata["weights_hash"] = weights_hash(model)
    return Checkpoint(model, metadata, path)
