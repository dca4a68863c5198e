"""Anybody's classifier by name: a function in a Python file, or a file of weights."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
from torch import nn

from advlab import datasets
from advlab.attacks import check_eps
from advlab.checkpoints import Checkpoint, load_into, load_weights, read_state, weights_hash
from advlab.data import ImageData
from advlab.forward import predict
from advlab.machine import pick_device

WEIGHTS = (".safetensors", ".pth", ".pt")


def is_target(text: str) -> bool:
    """Tell whether `text` names a function in a file or a weights file, not a shipped model."""
    return ".py" in text or _is_weights(text)


def _is_weights(text: str) -> bool:
    path = Path(text).expanduser()
    return path.suffix in WEIGHTS or (path.suffix != ".py" and path.is_file())


def parse_eps(text: str) -> float:
    """Return the size that "8/255" or "0.03" stands for.

    Raises:
        ValueError: if it is no number from 0 to 1.
    """
    try:
        eps = float(Fraction(text.replace(" ", "")))
    except (ValueError, ArithmeticError):
        raise ValueError(f"eps {text!r} is no number; write 8/255 or 0.03") from None
    return check_eps(eps)


def load_function(target: str) -> nn.Module:
    """Import a Python file and return the model that a function in it makes.

    This runs the file's code, with all rights that you have: import only files that you trust. The
    file's folder is searched for its imports meanwhile.

    Args:
        target: "FILE.py:FUNCTION". The function is called without arguments.

    Raises:
        ValueError: if the text is not of that form, there is no such function, its code fails, it
            needs arguments, or it returns no `nn.Module`.
        FileNotFoundError: if there is no such file.
    """
    name, colon, function = target.rpartition(":")
    if not colon or Path(name).suffix != ".py" or not function.isidentifier():
        raise ValueError(
            f"{target!r} names no function in a Python file; write FILE.py:FUNCTION, such as "
            "mine.py:make_model"
        )
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent))
    before = set(sys.modules)
    try:
        with _own_errors(f"importing {name}", path):
            module = _import(path)
        maker = _function_of(module, function, name)
        with _own_errors(f"{function}() in {name}", path):
            model = maker()
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{function}() in {name} returned {type(model).__name__}; it must return the model, an "
            "nn.Module"
        )
    _send_along(set(sys.modules) - before, path.parent)
    return model.eval()


def _send_along(names: Iterable[str], folder: Path) -> None:
    """Let a cluster's workers be sent the code of those modules that lie in a folder."""
    for name in names:
        file = Path(getattr(sys.modules[name], "__file__", None) or "/")
        if file.is_relative_to(folder) and "site-packages" not in file.parts:
            cloudpickle.register_pickle_by_value(sys.modules[name])


@contextmanager
def _own_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a script without a guard ends by sys.exit
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if Path(step.filename) == path]
        where = f" in line {lines[-1]}" if lines else ""
        told = f"{doing} failed{where}: {type(error).__name__}: {error}"
        raise ValueError(told) from error


def _import(path: Path) -> ModuleType:
    name = f"advlab_target_{path.stem}"  # as path.stem it could hide a module that others import
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the ending is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function_of(module: ModuleType, function: str, name: str) -> Any:
    """Return a function that can be called without arguments."""
    found = getattr(module, function, None)
    if found is None or not callable(found):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        there = f"there are {', '.join(own)}" if own else "it defines none"
        raise ValueError(f"{name} has no function {function}; {there}")
    if isinstance(found, nn.Module):
        raise ValueError(
            f"{function} in {name} is a model, not a function; write one that returns it, such as "
            f"def make_model(): return {function}"
        )
    needed = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{function} in {name} needs arguments ({', '.join(needed)}); write a function that "
            f"needs none, such as def make_model(): return {function}(...)"
        )
    return found


def check_fit(model: nn.Module, data: ImageData) -> int:
    """Show a model two images; return how many outputs it has.

    Args:
        model: On the device of the images.
        data: The data it is meant for.

    Raises:
        ValueError: if it fails on such images, returns no logits, or too few for the classes.
    """
    images, _ = data.test.first(min(2, len(data.test))).batch(slice(None))
    told = f"images of shape {data.shape} ({data.name})"
    try:
        outputs = predict(model, images).shape[1]
    except Exception as error:
        raise ValueError(
            f"the model fails on {told}: {type(error).__name__}: {error}. Choose the data that it "
            "was made for (--dataset), or let the function return a model that takes these"
        ) from error
    if outputs < len(data.classes):
        raise ValueError(
            f"the model has {outputs} outputs, {data.name} has {len(data.classes)} classes "
            f"({first_names(data.classes)}); choose the data that it was made for (--dataset)"
        )
    return outputs


def first_names(names: Sequence[str], most: int = 10) -> str:
    """Return names as a text: the first `most`, and that there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def open_data(dataset: str, data_dir: str, device: str, test_n: int | None) -> ImageData:
    """Load the first test images of the data that a command asks for, and one training image.

    Args:
        dataset, data_dir, device: As in `lab.start`.
        test_n: How many at most; None for all.
    """
    where = pick_device(device)
    return datasets.load(dataset, data_dir, train_n=1, test_n=test_n).to(where)


def open_target(
    target: str, data: ImageData, weights: Path | None = None, arch: str | None = None
) -> Checkpoint:
    """Open a classifier by name, on the device of the data.

    Args:
        target: "FILE.py:FUNCTION" (see `load_function`: it runs the file's code), or a weights file
            of one of our architectures.
        data: What it is to be tried on.
        weights: Weights for the model that FUNCTION makes: any file that `checkpoints.read_state`
            reads.
        arch: Architecture of a weights file that does not say it itself.

    Raises:
        ValueError: as `load_function` and `check_fit`; if `weights` go with a weights file; if
            weights are damaged or do not fit the model (CheckpointError).
        FileNotFoundError: if there is no such file.
    """
    device = data.test.images.device
    if _is_weights(target):
        if weights is not None:
            raise ValueError(f"{target} is a weights file itself; leave --weights {weights} out")
        opened = load_weights(Path(target).expanduser(), arch, data.shape, len(data.classes))
        check_fit(opened.model.to(device), data)
        return opened
    model = load_function(target)
    if weights is not None:
        load_into(model, read_state(weights), weights)
    check_fit(model.to(device), data)
    # What such a model computes does not show in its class and weights alone: its name is in it.
    metadata: dict[str, Any] = {
        "arch": f"{type(model).__name__} of {target}",
        "train_eps": None,
        "seed": None,
    }
    metadata |= {"recipe": {"name": None}, "weights_hash": weights_hash(model)}
    file, _, function = target.rpartition(":")
    return Checkpoint(model, metadata, Path(file).with_name(f"{Path(file).stem}:{function}"))
