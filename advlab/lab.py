"""One lesson's settings: profile, data, device, models and folders, read in one place.

A lesson's parameters cell holds plain literals; "auto" there means the environment variable of that
setting (ADVLAB_PROFILE, ADVLAB_DATASET, ADVLAB_DATA, ADVLAB_OUTPUT, ADVLAB_DEVICE), or else the
default.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from advlab import datasets, files, paper
from advlab.data import ImageData, check_integer
from advlab.machine import pick_device
from advlab.recipes import FAST, PAPER, Profile, profile_for
from advlab.store import Store, Zoo, key

if TYPE_CHECKING:  # worker processes open a lab too, and draw nothing
    import pandas as pd
    from matplotlib.figure import Figure

LARGEST_PNG = 150_000


@dataclass(frozen=True)
class Lab:
    """What a lesson works with; made by `start`.

    Args:
        profile: "quick", "lesson", "fast" or "paper".
        settings: What that profile means on these data.
        data: Images and labels, on the lesson's device.
        zoo: The trained models, on that device.
        output_dir: Folder of results; figures and tables go into its figures/.
        store: What was measured before.
    """

    profile: str
    settings: Profile
    data: ImageData
    zoo: Zoo
    output_dir: Path
    store: Store

    @property
    def device(self) -> torch.device:
        """Where images and models are."""
        return self.data.train.images.device

    @property
    def is_paper_scale(self) -> bool:
        """Whether the numbers can be set beside the paper's: its data, whole, its procedure."""
        return self.data.papers and self.settings.recipe in (PAPER, FAST)

    def caption(self, n: int | None = None, recipe: str | None = None) -> str:
        """Return what every figure says of its origin.

        Args:
            n: Test images behind it; None for all, 0 for a figure of something else.
            recipe: Name of what trained the models shown; None for the lesson's own.
        """
        recipe = recipe or self.settings.recipe.name
        n = len(self.data.test) if n is None else n
        images = f"{n:,} test image{'s' if n > 1 else ''}, " if n else ""
        return f"{self.data.name}, {images}recipe {recipe}, seed {self.zoo.seed}"

    def save(
        self,
        name: str,
        figure: Figure | None = None,
        table: pd.DataFrame | None = None,
        *,
        n: int | None = None,
        recipe: str | None = None,
    ) -> None:
        """Write `figure` as NAME.png and `table` as NAME.csv into figures/ of the output folder.

        Args:
            name: File name without ending.
            figure: Gets a line at its foot that says what it was measured on.
            table: Tidy rows.
            n, recipe: As in `caption`.

        Raises:
            OSError: if it cannot be written; names the folder and the mend.
        """
        folder = self.output_dir / "figures"
        if figure is not None:
            foot = 0.2 / figure.get_figheight()  # inches, kept free for the line
            engine: Any = figure.get_layout_engine()
            if engine is not None:
                engine.set(rect=(0, foot, 1, 1 - foot))
            size = max(8.0, figure.get_figwidth())  # a page shows a wide figure reduced
            style: dict[str, Any] = {"ha": "right", "va": "bottom", "size": size, "color": "0.3"}
            figure.text(0.99, 0.01, self.caption(n, recipe), **style)
            files.write_bytes(folder / f"{name}.png", _render(figure))
        if table is not None:
            files.write_table(folder / f"{name}.csv", table)

    def __str__(self) -> str:
        text = (
            f"profile {self.profile} | {self.data.name}: {len(self.data.train):,} training and "
            f"{len(self.data.test):,} test images | recipe {self.settings.recipe.name} | "
            f"seed {self.zoo.seed}"
        )
        if self.device.type != "cpu":
            text += f" | device {self.device.type}"
        if not self.data.papers:
            text += f"\nThis is {self.data.name}, not {paper.DATA}: "
            text += "nothing here compares with the paper."
        if not self.settings.keep and (reason := self.zoo.why_not_shipped("cnn")):
            text += f"\nModels are trained here, not those that are shipped: {reason}."
            if files.repository() is None and not files.shipped_checkpoints().is_dir():
                text += f"\nNo clone of the repository holds {Path.cwd()}: start the lesson in one."
        return text


def _render(figure: Figure) -> bytes:
    """Return `figure` as a PNG of at most `LARGEST_PNG` bytes.

    Line figures are far below. Grids of photographs are first reduced to 256 colours, then in size.
    """
    for dpi in (110, 90, 70, 50):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        if drawn.tell() > LARGEST_PNG:
            image = Image.open(drawn).convert("RGB").quantize(256)
            drawn = io.BytesIO()
            image.save(drawn, format="PNG", optimize=True)
        if drawn.tell() <= LARGEST_PNG:
            break
    return drawn.getvalue()


def profile_name(profile: str = "auto") -> str:
    """Return the name of the profile that the settings ask for.

    Raises:
        ValueError: if there is no such profile.
    """
    name = files.setting(profile, "ADVLAB_PROFILE", "lesson")
    profile_for(name, papers=True)
    return name


def default_output(profile: str, dataset: str) -> Path:
    """Return where results go unless told otherwise: outputs/PROFILE-DATASET in the repository.

    `dataset` is as `datasets.resolve` returns it.
    """
    return files.home() / "outputs" / f"{profile}-{datasets.folder_key(dataset)}"


def output_folder(output_dir: str, profile: str, dataset: str) -> Path:
    """Return where the settings let results go, absolute.

    Raises:
        ValueError: as `files.results_folder`.
    """
    chosen = files.setting(output_dir, "ADVLAB_OUTPUT")
    return files.results_folder(chosen or default_output(profile, dataset))


def start(
    profile: str = "auto",
    dataset: str = "auto",
    seed: int = 0,
    data_dir: str = "auto",
    output_dir: str = "auto",
    device: str = "auto",
    *,
    progress: bool = True,
) -> Lab:
    """Read the settings of a lesson and open its data and models.

    Args:
        profile: "quick", "lesson", "fast", "paper"; "auto": ADVLAB_PROFILE or "lesson".
        dataset: As in `datasets.resolve`; "auto": ADVLAB_DATASET, or CIFAR-10 where it is present
            or can be downloaded, else Shapes-10.
        seed: Of initialisation, order, flips and noise.
        data_dir: Folder that holds torchvision's data; "auto": ADVLAB_DATA, else data/.
        output_dir: Folder of results; "auto": ADVLAB_OUTPUT or outputs/PROFILE-DATASET.
        device: "cpu", "cuda", "mps"; "auto": ADVLAB_DEVICE, or a GPU where there is one.
        progress: Show bars while training.

    Raises:
        ValueError: if the profile, data set or device is unknown, the seed no integer >= 0, or the
            output folder one of the repository's own.
        DataError: if the data are damaged or cannot be had.
    """
    profile = profile_name(profile)  # a wrong name is told before data are read
    check_integer("seed", seed)
    where = pick_device(device)
    name, root = datasets.resolve(dataset, data_dir)
    output = output_folder(output_dir, profile, name)
    settings = profile_for(profile, papers=datasets.are_papers(name))
    data = datasets.load(name, root, train_n=settings.train_n, test_n=settings.test_n).to(where)
    if settings.keep:
        trained = output / "checkpoints"
    else:
        trained = files.cache_dir() / "models" / key("model", settings.recipe.name, data.md5)
    shipped = files.shipped_checkpoints() if settings.shipped else None
    zoo = Zoo(data, settings.recipe, seed, trained, shipped=shipped, progress=progress)
    return Lab(profile, settings, data, zoo, output, Store(files.cache_dir() / "measured"))
