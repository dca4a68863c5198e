"""One lesson's settings: profile, data, models and folders, read in one place.

A lesson's parameters cell holds plain literals; "auto" there means the environment variable of that
setting (ADVLAB_PROFILE, ADVLAB_DATASET, ADVLAB_DATA, ADVLAB_OUTPUT), or else the default.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from advlab import data, files, paper
from advlab.checkpoints import Training, Zoo
from advlab.data import ImageData
from advlab.training import FAST, FGSM, PAPER, QUICK, ROBUST, RS_FGSM, Recipe

if TYPE_CHECKING:  # worker processes open a session too, and draw nothing
    import pandas as pd
    from matplotlib.figure import Figure

LARGEST_PNG = 150_000


@dataclass(frozen=True)
class Profile:
    """How much of everything a lesson does.

    Args:
        recipe: How models are trained.
        train_n, test_n: Images used; None for all.
        sweep: Training eps of the CNN's sweep.
        robust: Recipes of the adversarially trained models (lessons 06 to 08), by name.
        shipped: Whether the trained models of the repository may be used.
        keep: Whether trained models belong to the run's results, not to the cache.
    """

    recipe: Recipe
    train_n: int | None = None
    test_n: int | None = None
    sweep: tuple[float, ...] = paper.SWEEP_TRAIN_EPS
    robust: Mapping[str, Recipe] = field(default_factory=lambda: _ROBUST)
    shipped: bool = False
    keep: bool = False

    def models(self) -> list[tuple[str, Training]]:
        """Return (architecture, training eps) of every model that lessons 01 to 05 need.

        Slow ones first, so that two cores finish at about the same time.
        """
        wanted = [("cnn-lstm", 0.0), ("cnn", 0.0), ("cnn-lstm-positions", 0.0)]
        wanted += [("cnn-lstm", eps) for eps in paper.TABLE_TRAIN_EPS if eps]
        wanted += [("cnn-lstm-positions", 0.2)]
        return wanted + [("cnn", eps) for eps in self.sweep if eps]

    def robust_models(self) -> list[tuple[str, Training]]:
        """Return (architecture, recipe) of the adversarially trained models, slow ones first."""
        best, quick = self.robust["robust"], self.robust["rs-fgsm"]
        wanted: list[tuple[str, Training]] = [
            ("cnn-lstm", best),
            ("cnn", best),
            ("cnn-lstm", quick),
        ]
        return wanted + [("cnn", recipe) for recipe in self.robust.values() if recipe != best]


def _at_eps(steps: int) -> Recipe:
    """Return the recipe RS-FGSM for an eps of so many steps of 1/255."""
    eps = steps / 255
    return replace(RS_FGSM, name=f"rs-fgsm-eps{steps}", eps=eps, alpha=1.25 * eps)


def _in_short(epochs: int) -> dict[str, Recipe]:
    """Return the same recipes for a few thousand images."""
    short = {"epochs": epochs, "batch_size": 32, "average": 0.0, "warm_up": 0.7}
    # No early stopping: by a few hundred images, an epoch that names one class could be the best.
    short |= {"optimiser": "adam", "lr": 3e-3, "weight_decay": 0.0, "early_stopping": False}
    return {name: replace(recipe, **short) for name, recipe in _ROBUST.items()}


_ROBUST = {r.name: r for r in (FGSM, _at_eps(2), _at_eps(4), RS_FGSM, ROBUST)}
_SHORT_SWEEP = (0.0, 0.005, 0.01, 0.015, 0.2, 0.5)
PROFILES = {
    "quick": Profile(QUICK, train_n=2_000, test_n=500, sweep=_SHORT_SWEEP, robust=_in_short(4)),
    "lesson": Profile(PAPER, shipped=True),
    # Of the shipped models none is of recipe FAST; the adversarially trained ones are the same.
    "fast": Profile(FAST, sweep=_SHORT_SWEEP, shipped=True, keep=True),
    "paper": Profile(PAPER, keep=True),
}
# On Shapes-10 nothing is shipped, so profile "lesson" trains every model on the spot.
SHAPES_LESSON = Profile(QUICK, train_n=4_000, test_n=2_000, sweep=_SHORT_SWEEP, robust=_in_short(6))


@dataclass(frozen=True)
class Session:
    """What a lesson works with; made by `start`.

    Args:
        profile: "quick", "lesson", "fast" or "paper".
        settings: What that profile means on this data set.
        data: Images and labels.
        zoo: The trained models.
        output_dir: Folder of results; figures and tables go into its figures/.
        cells: Folder of measured cells (see `evaluation.accuracy_table`).
    """

    profile: str
    settings: Profile
    data: ImageData
    zoo: Zoo
    output_dir: Path
    cells: Path

    @property
    def is_paper_scale(self) -> bool:
        """Whether the numbers can be set beside the paper's: CIFAR-10, whole, its procedure."""
        return self.data.name == "CIFAR-10" and self.settings.recipe in (PAPER, FAST)

    def caption(self, n: int | None = None, recipe: str | None = None) -> str:
        """Return what every figure says of its origin.

        Args:
            n: Test images behind it; None for all, 0 for a figure of something else.
            recipe: Name of what trained the models shown; None for the session's own.
        """
        recipe = recipe or self.settings.recipe.name
        n = len(self.data.test) if n is None else n
        images = f"{n:,} test images, " if n else ""
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
            foot = 0.17 / figure.get_figheight()  # inches, kept free for the line
            engine = figure.get_layout_engine()
            if engine is not None:
                engine.set(rect=(0, foot, 1, 1 - foot))
            figure.text(
                0.99, 0.01, self.caption(n, recipe), ha="right", va="bottom", size=6, color="0.4"
            )
            files.write_bytes(folder / f"{name}.png", _render(figure))
        if table is not None:
            with files.atomic_write(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g")

    def __str__(self) -> str:
        text = (
            f"profile {self.profile} | {self.data.name}: {len(self.data.train):,} training and "
            f"{len(self.data.test):,} test images | recipe {self.settings.recipe.name} | "
            f"seed {self.zoo.seed}"
        )
        if self.data.name == "Shapes-10":
            text += "\nThis is Shapes-10, not CIFAR-10: nothing here compares with the paper."
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


def setting(value: str | None, variable: str, default: str) -> str:
    """Return `value`, or for None, "" and "auto" the environment's `variable` or `default`."""
    return os.environ.get(variable) or default if value in (None, "", "auto") else value


def resolve_data(dataset: str, data_dir: str) -> tuple[str, Path | None]:
    """Return name and folder of the data set that the settings ask for (see `data.resolve`)."""
    wanted = setting(dataset, "ADVLAB_DATASET", "auto")
    return data.resolve(wanted, setting(data_dir, "", "") or None)


def check_profile(profile: str) -> None:
    """Raise ValueError if there is no such profile."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")


def settings_of(profile: str, dataset: str) -> Profile:
    """Return what `profile` means on `dataset` ("cifar10" or "shapes10")."""
    if profile == "lesson" and dataset == "shapes10":
        return SHAPES_LESSON
    return PROFILES[profile]


def default_output(profile: str, dataset: str) -> Path:
    """Return where results go unless told otherwise: outputs/PROFILE-DATASET in the repository."""
    return files.home() / "outputs" / f"{profile}-{dataset}"


def start(
    profile: str = "auto",
    dataset: str = "auto",
    seed: int = 0,
    data_dir: str = "auto",
    output_dir: str = "auto",
    *,
    progress: bool = True,
) -> Session:
    """Read the settings of a lesson and open its data and models.

    Args:
        profile: "quick", "lesson", "fast", "paper"; "auto": ADVLAB_PROFILE or "lesson".
        dataset: "cifar10", "shapes10"; "auto": ADVLAB_DATASET, or CIFAR-10 where it is present or
            can be downloaded, else Shapes-10.
        seed: Of initialisation, order, flips and noise.
        data_dir: Folder that holds CIFAR-10; "auto": ADVLAB_DATA, then data/.
        output_dir: Folder of results; "auto": ADVLAB_OUTPUT or outputs/PROFILE-DATASET.
        progress: Show bars while training.

    Raises:
        ValueError: if the profile or data set is unknown, or the seed no integer >= 0.
        DataError: if the data are damaged or cannot be had.
    """
    profile = setting(profile, "ADVLAB_PROFILE", "lesson")
    check_profile(profile)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an integer from 0 on")
    name, root = resolve_data(dataset, data_dir)
    settings = settings_of(profile, name)
    images = data.load(name, root, train_n=settings.train_n, test_n=settings.test_n)
    chosen = setting(output_dir, "ADVLAB_OUTPUT", "")
    output = Path(chosen).expanduser() if chosen else default_output(profile, name)
    if settings.keep:
        trained = output / "checkpoints"
    else:
        trained = files.cache_dir() / "models" / f"{settings.recipe.name}-{images.md5[:8]}"
    zoo = Zoo(
        images,
        settings.recipe,
        seed,
        trained,
        shipped=files.shipped_checkpoints() if settings.shipped else None,
        progress=progress,
    )
    return Session(profile, settings, images, zoo, output, files.cache_dir() / "cells")
