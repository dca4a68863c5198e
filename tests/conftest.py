"""Shared fixtures: small models and data, and folders of a test's own for everything written."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import hypothesis
import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from matplotlib import pyplot as plt
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from torch import Tensor, nn

from advlab import datasets, files
from advlab._torchvision import datasets as torchvision_sets
from advlab.checkpoints import Checkpoint, weights_hash
from advlab.data import ImageData, Split
from advlab.recipes import Recipe
from advlab.store import Zoo
from advlab.upkeep import tasks
from advlab.widgets import AttackExplorer

mpl.use("Agg")
# Hypothesis would keep a folder of its own in the current one; this one goes at the end.
HYPOTHESIS_FOLDER = tempfile.TemporaryDirectory(prefix="advlab-hypothesis-")
set_hypothesis_home_dir(HYPOTHESIS_FOLDER.name)
hypothesis.settings.register_profile("advlab", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("advlab")

# Where the real CIFAR-10 is; the tests themselves run as if it were nowhere.
_found = datasets.find("cifar10")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")
REAL_DATA = str(_found.absolute()) if _found else None
# Images and numbers of classes that are not CIFAR-10's.
OTHER_KINDS = [(s, k) for s in ((1, 28, 28), (3, 64, 48), (4, 8, 8)) for k in (2, 101)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TINY = Recipe("tiny", epochs=2, batch_size=32, lr=2e-3)


def pytest_configure():
    """Let Ctrl-C reach what tests start: a shell's `&` has all below it ignore that signal."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Start the long tests first: the short ones then fill what is left of either core."""
    long = ("test_notebooks", "test_course", "test_browser", "test_site", "test_wheel")
    items.sort(key=lambda item: item.path.stem not in long)


def pytest_unconfigure():
    """Remove that folder: the workers of pytest-xdist end without doing so."""
    HYPOTHESIS_FOLDER.cleanup()


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Assert that every weight and buffer of `model` is exactly that of `state`."""
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name


def make_small_cnn(
    seed: int = 0, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10
) -> nn.Module:
    """Return a small model with the paper's order of layers and BN statistics far from (0, 1)."""
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(12),
            nn.Flatten(),
            nn.Linear(12 * -(-height // 4) * -(-width // 4), classes),
        )
        randomise_batch_norm(model)
    return model.eval()


def randomise_batch_norm(model: nn.Module) -> nn.Module:
    """Give each batch-norm layer statistics, weights and biases as if it had been trained."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0.1, 0.2)
            layer.running_var.uniform_(0.05, 0.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model


def make_batch(
    n: int, classes: int = 10, seed: int = 0, shape: tuple[int, int, int] = (3, 32, 32)
) -> tuple[Tensor, Tensor]:
    """Return `n` random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, *shape, generator=generator)
    return images, torch.randint(0, classes, (n,), generator=generator)


def balance(model: nn.Module, images: Tensor) -> Tensor:
    """Let an untrained model tell `images` apart; return its predictions, to serve as labels.

    It would put all of them into one class with nearly the same margin, so that an attack breaks
    all or none. Its last layer is shifted: each class is then as likely as any other.
    """
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias -= model(images).mean(0)
        return model(images).argmax(1)


def write_lesson(home: Path, name: str, *code: str) -> None:
    """Write a notebook with a parameters cell and one for each of `code`."""
    parameters = "profile = 'auto'\nseed = 0\nword = 'quiet'"
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(one) for one in code]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    path = home / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_cifar(
    kind: type, root: Path, monkeypatch: pytest.MonkeyPatch, n: int = 20
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Write `n` images into each file of CIFAR-10 or -100; torchvision then expects their MD5 sums.

    Returns:
        Pixels (N, 3, 32, 32) uint8 and labels of the training and the test split.
    """
    hundred, folder = kind is torchvision_sets.CIFAR100, root / kind.base_folder
    rng, parts, classes = np.random.default_rng(0), [], 100 if hundred else 10
    folder.mkdir(parents=True)

    def put(name: str, content: dict) -> list[str]:
        written = pickle.dumps(content)
        (folder / name).write_bytes(written)
        return [name, hashlib.md5(written).hexdigest()]

    for listed in ("train_list", "test_list"):
        put_there, pixels, labels = [], [], []
        for name, _ in getattr(kind, listed):
            pixels.append(rng.integers(0, 256, (n, 3072), dtype=np.uint8))
            labels.append(rng.permutation(-np.arange(n) % classes))
            numbers = labels[-1].tolist()
            content = {"data": pixels[-1], "fine_labels" if hundred else "labels": numbers}
            put_there.append(put(name, content))
        monkeypatch.setattr(kind, listed, put_there)
        parts.append((np.concatenate(pixels).reshape(-1, 3, 32, 32), np.concatenate(labels)))
    names = [f"class {k}" for k in range(100)] if hundred else list(CIFAR10_CLASSES)
    _, found = put(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": found})
    return parts


def draw_pictures(folder: Path, name: str, n: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write `n` pictures of a class: red tells which, and green whether it is a dog."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(n):
        colour = (10 * k, 255 if name == "dog" else 0, 0)
        Image.new("RGB", size, colour).save(folder / name / f"{k}.png")
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the bytes of a picture's file."""
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def upload(explorer: AttackExplorer, content: bytes) -> None:
    """Give a picture's file to the explorer, as a reader's browser does."""
    day = datetime(2026, 1, 1, tzinfo=UTC)
    entry = {"name": "x.png", "type": "image/png", "size": len(content), "last_modified": day}
    explorer.upload.value = [{**entry, "content": memoryview(content)}]


def as_checkpoint(model: nn.Module, path: Path, **about: object) -> Checkpoint:
    """Return a model as a checkpoint of a CNN of which no more is known than `about`."""
    unknown = {"arch": "cnn", "train_eps": None, "seed": None, "recipe": {"name": None}}
    return Checkpoint(model, {**unknown, "weights_hash": weights_hash(model), **about}, path)


def share_of_moved_pixels(one: Tensor, other: Tensor) -> float:
    """Return the share of pixels that differ by more than rounding."""
    return float(((one - other).abs() > 1e-6).float().mean())


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Let everything be written below tmp_path, and forget the caller's settings."""
    monkeypatch.setenv("ADVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ADVLAB_OUTPUT", str(tmp_path / "output"))
    for name in files.SETTINGS:
        if name not in ("ADVLAB_CACHE", "ADVLAB_OUTPUT"):
            monkeypatch.delenv(name, raising=False)
    tasks._opened.cache_clear()  # what a process keeps open has folders of another test
    yield
    plt.close("all")


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A clone without data or checkpoints, in place of the one under test."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(files, "home", lambda: home)
    return home


@pytest.fixture
def page():
    """A page of a real browser; what its console tells of errors is in `page.errors`."""
    playwright = pytest.importorskip("playwright.sync_api", reason='needs the extra "browser"')
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda told: told.type == "error" and page.errors.append(told.text))
        yield page
        browser.close()


def artefact(name: str) -> str:
    """Return where a test keeps a picture of what it saw."""
    folder = files.home() / "outputs" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / name)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(datasets, "_reachable", lambda host, port: False)


@pytest.fixture
def cifar10_root():
    """Folder of the real CIFAR-10; skips without it."""
    if not REAL_DATA or not (Path(REAL_DATA) / datasets.CIFAR10_FOLDER).is_dir():
        pytest.skip("needs CIFAR-10: set ADVLAB_DATA to the folder that holds it")
    return Path(REAL_DATA)


@pytest.fixture
def fake_cifar10(tmp_path, monkeypatch):
    """Folder with a made-up CIFAR-10 of 100 and 20 images that passes torchvision's checks."""
    write_cifar(torchvision_sets.CIFAR10, tmp_path / "fake", monkeypatch)
    return tmp_path / "fake"


@pytest.fixture
def linear_model():
    """A model of two classes whose FGSM is known by hand: x + eps * sign(w_other - w_label)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
    return model.eval()


@pytest.fixture
def small_cnn():
    return make_small_cnn()


@pytest.fixture
def batch():
    return make_batch(12)


@pytest.fixture(scope="session")
def shapes() -> ImageData:
    """Return a Shapes-10 of 160 and 130 images; 130 is no multiple of the chunk of 100."""
    return datasets.Shapes10(160, 130)


@pytest.fixture
def tiny_shapes(shapes) -> ImageData:
    """Return a Shapes-10 of 64 and 32 images, for trainings whose result does not matter."""
    return ImageData(shapes.spec, shapes.train.first(64), shapes.test.first(32))


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder of this run that the workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@pytest.fixture(scope="session")
def zoo(tmp_path_factory, shapes) -> Zoo:
    """Return a zoo whose models are trained once in the session."""
    folder = shared_folder(tmp_path_factory, "zoo")
    return Zoo(shapes, TINY, 0, folder, progress=False)


@pytest.fixture(scope="session")
def trained(zoo) -> tuple[Checkpoint, Checkpoint]:
    """Return a baseline CNN and one trained with eps = 0.1: quick, so not accurate."""
    return zoo.get("cnn"), zoo.get("cnn", 0.1)


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> tuple[nn.Module, Split]:
    """Return a CNN that has learned Shapes-10, and the test split: the longest training here."""
    images = datasets.Shapes10(6_000, 1_000)
    recipe = Recipe("learning", epochs=5, batch_size=64, lr=4e-3, one_cycle=True)
    folder = shared_folder(tmp_path_factory, "learned")
    zoo = Zoo(images, recipe, 0, folder, progress=False)
    return zoo.get("cnn").model, images.test
