"""A lesson's settings: arguments, environment, device, folders, what is saved where."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import draw_pictures
from matplotlib import pyplot as plt
from matplotlib.image import imread

from advlab import files, lab, plots, recipes, store
from advlab.data import DataError
from advlab.evaluation import accuracy_table
from advlab.lab import start
from advlab.recipes import FAST, PAPER, QUICK, SMALL, Profile
from advlab.upkeep.tasks import Options

COUNTS = "1,000 training and 300 test images"


@pytest.fixture
def quick(empty_home, no_network):
    return start("quick", "shapes10", seed=3, progress=False)


@pytest.fixture
def small_profiles(monkeypatch):
    """Let no profile ask for more images than the made-up CIFAR-10 has."""
    small = Profile(recipes.Recipe("quick", 1), train_n=50, test_n=10)
    monkeypatch.setitem(recipes.PROFILES, "quick", small)


def pets(folder: Path, width: int = 40) -> str:
    """Draw pictures of two classes, eight of each; return how to ask for them."""
    for kind in ("cat", "dog"):
        draw_pictures(folder, kind, 8, (width, 30))
    return f"folder:{folder}"


def test_quick_on_shapes10(quick, tmp_path):
    assert quick.profile == "quick"
    data = quick.data
    assert (data.name, len(data.train), len(data.test)) == ("Shapes-10", 1_000, 300)
    assert quick.settings.recipe == quick.zoo.recipe == QUICK
    assert (quick.zoo.seed, quick.zoo.shipped) == (3, None)
    assert not quick.is_paper_scale
    assert quick.output_dir == tmp_path / "output"
    assert tmp_path / "cache" in quick.zoo.folder.parents
    assert tmp_path / "cache" in quick.store.folder.parents


def test_lesson_says_what_it_is(quick):
    assert str(quick) == (
        f"profile quick | Shapes-10: {COUNTS} | recipe quick | seed 3\n"
        "This is Shapes-10, not CIFAR-10: nothing here compares with the paper."
    )
    assert quick.caption() == "Shapes-10, 300 test images, recipe quick, seed 3"
    assert quick.caption(40) == "Shapes-10, 40 test images, recipe quick, seed 3"
    assert quick.caption(0, "robust") == "Shapes-10, recipe robust, seed 3"


def test_lesson_says_why_a_shipped_model_cannot_serve(fake_cifar10, empty_home, monkeypatch):
    made = start("lesson", "cifar10", data_dir=str(fake_cifar10))
    assert made.zoo.shipped == empty_home / "data" / "checkpoints"
    assert made.settings.recipe == PAPER
    assert made.is_paper_scale
    assert str(made).splitlines() == [
        "profile lesson | CIFAR-10: 100 training and 20 test images | recipe paper | seed 0",
        "Models are trained here, not those that are shipped: there is no shipped "
        "cnn-baseline-seed0.safetensors.",
    ]
    monkeypatch.setattr(type(made.zoo), "why_not_shipped", lambda *args: "")
    assert str(made).count("\n") == 0


@pytest.mark.parametrize("left_out", ["auto", None, ""])
def test_environment_is_read_for_auto_and_an_argument_beats_it(
    empty_home, no_network, monkeypatch, tmp_path, left_out
):
    monkeypatch.setenv("ADVLAB_PROFILE", "quick")
    monkeypatch.setenv("ADVLAB_DATASET", "shapes10")
    made = start(left_out, left_out)
    assert (made.profile, made.data.name) == ("quick", "Shapes-10")
    monkeypatch.setenv("ADVLAB_PROFILE", left_out or "auto")  # says no more than the argument
    assert start("auto", "shapes10").profile == "lesson"
    for name, value in (("PROFILE", "paper"), ("DATASET", "cifar10"), ("DEVICE", "abacus")):
        monkeypatch.setenv(f"ADVLAB_{name}", value)
    made = start("quick", "shapes10", output_dir=str(tmp_path / "mine"), device="cpu")
    assert (made.profile, made.data.name) == ("quick", "Shapes-10")
    assert (made.output_dir, made.device) == (tmp_path / "mine", torch.device("cpu"))


def test_environment_points_at_the_data(fake_cifar10, empty_home, small_profiles, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    made = start("quick")
    assert made.data.name == "CIFAR-10"
    assert (len(made.data.train), len(made.data.test)) == (50, 10)
    assert not made.is_paper_scale  # the quick recipe
    assert made.zoo.shipped is None


def test_lesson_on_shapes10_ships_nothing(empty_home, no_network):
    made = start("lesson")
    assert made.data.name == "Shapes-10"
    assert made.zoo.shipped is None
    assert made.settings is SMALL


@pytest.mark.parametrize(("profile", "recipe"), [("fast", FAST), ("paper", PAPER)])
def test_whole_runs_keep_their_models_with_their_results(
    fake_cifar10, empty_home, tmp_path, profile, recipe
):
    made = start(profile, "cifar10", data_dir=str(fake_cifar10))
    assert made.zoo.folder == tmp_path / "output" / "checkpoints"
    assert (made.zoo.shipped is None) == (profile == "paper")
    assert made.zoo.recipe == recipe
    assert made.is_paper_scale
    assert "shipped" not in str(made)
    assert len(made.data.train) == 100


def test_unknown_settings_are_named_before_data_are_read(empty_home, no_network, monkeypatch):
    with pytest.raises(ValueError, match="unknown data set 'imagenet'; choose auto, cifar10"):
        start("quick", "imagenet")
    with pytest.raises(DataError, match=r"no cifar-10-batches-py.* in nowhere"):
        start("quick", data_dir="nowhere")
    monkeypatch.setattr(lab.datasets, "load", None)
    with pytest.raises(ValueError, match="unknown profile 'slow'; choose one of quick, lesson, fa"):
        start("slow", "shapes10")
    for seed in (-1, 1.5, "0", None, True):
        with pytest.raises(ValueError, match=r"seed is .*; it must be an integer from 0 on"):
            start("quick", "shapes10", seed=seed)
    for device in ("abacus", "cuda:x", "cpu:7:7", "mps" if torch.cuda.is_available() else "cuda"):
        with pytest.raises(ValueError, match=rf"device '{device}' is not .*; choose auto, .*cpu"):
            start("quick", "shapes10", device=device)
        with monkeypatch.context() as patch:
            patch.setenv("ADVLAB_DEVICE", device)
            with pytest.raises(ValueError, match=f"device '{device}'"):
                start("quick", "shapes10")


# --- data sets apart


def test_lesson_on_a_folder_of_pictures(empty_home, small_profiles, tmp_path):
    made = start("quick", pets(tmp_path / "pets"), progress=False)
    assert (made.data.name, made.data.classes) == ("folder pets", ("cat", "dog"))
    assert (len(made.data.train), len(made.data.test)) == (14, 2)
    assert "This is folder pets, not CIFAR-10" in str(made)
    table = accuracy_table([made.zoo.get("cnn", 0.1)], made.data, [0.0, 0.1], store=made.store)
    assert set(table["data"]) == {"folder pets"}
    made.save("table", table=table)
    assert (tmp_path / "output" / "figures" / "table.csv").is_file()


def test_two_data_sets_share_neither_output_nor_models(
    fake_cifar10, empty_home, small_profiles, tmp_path, monkeypatch
):
    monkeypatch.delenv("ADVLAB_OUTPUT")
    one, other = pets(tmp_path / "pets"), pets(tmp_path / "elsewhere" / "pets", width=60)
    settings = [("shapes10",), ("cifar10", 0, str(fake_cifar10)), (one,), (f"{one}@16",), (other,)]
    labs = [start("quick", *arguments) for arguments in settings]
    assert labs[0].output_dir == empty_home / "outputs" / "quick-shapes10"
    assert not labs[0].output_dir.exists()  # nothing is written before something is saved
    assert len({made.output_dir for made in labs}) == len(labs)
    assert len({made.zoo.folder for made in labs[:4]}) == 4
    again = start("quick", f"{one}@32")
    assert (again.output_dir, again.zoo.folder) == (labs[2].output_dir, labs[2].zoo.folder)


def test_models_of_other_code_or_torch_lie_elsewhere(empty_home, small_profiles, monkeypatch):
    folders = [start("quick", "shapes10").zoo.folder for _ in range(2)]
    monkeypatch.setattr(torch, "__version__", "2.0")
    folders.append(start("quick", "shapes10").zoo.folder)
    monkeypatch.setattr(store, "code_hash", lambda *modules, package: "edited")
    folders.append(start("quick", "shapes10").zoo.folder)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


# --- what is saved


def test_save_writes_figure_and_table_with_the_caption(quick):
    plots.use_style()
    figure, axis = plt.subplots()
    axis.plot([0, 1])
    table = pd.DataFrame({"eps": [0.0, 0.1], "accuracy": [1 / 3, 0.25]})
    quick.save("fig9_example", figure, table, n=40)
    folder = quick.output_dir / "figures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fig9_example.csv",
        "fig9_example.png",
    ]
    assert (folder / "fig9_example.csv").read_text() == "eps,accuracy\n0,0.333333\n0.1,0.25\n"
    assert imread(folder / "fig9_example.png").ndim == 3
    assert [text.get_text() for text in figure.texts] == [quick.caption(40)]
    quick.save("only_table", table=table)
    assert not (folder / "only_table.png").exists()


def test_save_into_a_blocked_folder_names_it_and_the_mend(quick):
    quick.output_dir.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write .*output.*t\.csv.*ADVLAB_OUTPUT"):
        quick.save("t", table=pd.DataFrame({"a": [1]}))
    assert quick.output_dir.read_text() == "a file where the folder should be"


# --- folders


def test_home_is_the_clone_that_holds_the_notebook_or_the_package_or_the_current_folder(
    monkeypatch, tmp_path
):
    own = Path(files.__file__).parent.parent
    monkeypatch.chdir(tmp_path)
    assert files.home() == own
    assert files.shipped_checkpoints() == files.home() / "data" / "checkpoints"
    monkeypatch.chdir(make_clone(tmp_path / "clone") / "notebooks")
    assert files.home() == tmp_path / "clone"
    assert files.shipped() == files.clone() == tmp_path / "clone"
    wheel = tmp_path / "site-packages" / "advlab"
    monkeypatch.setattr(files, "PACKAGE", wheel)
    assert files.home() == tmp_path / "clone"
    (wheel / "_repository").mkdir(parents=True)
    assert files.shipped() == tmp_path / "clone"
    monkeypatch.chdir(tmp_path)
    assert files.repository() is None
    assert files.home() == tmp_path
    assert files.shipped() == wheel / "_repository"
    with pytest.raises(FileNotFoundError, match=r"no clone of the repository holds .*run it there"):
        files.clone()
    with pytest.raises(ValueError, match="holds the repository's own files"):
        files.results_folder(wheel / "_repository" / "outputs")
    (wheel / "_repository").rmdir()
    assert files.shipped() == tmp_path


def test_lesson_outside_any_clone_says_so(fake_cifar10, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "site-packages" / "advlab")
    monkeypatch.chdir(tmp_path)
    made = start("lesson", data_dir=str(fake_cifar10))
    assert str(made).endswith(
        f"No clone of the repository holds {tmp_path}: start the lesson in one."
    )


@pytest.mark.parametrize("name", ["", "figures", "notebooks/.."])
def test_results_are_never_written_over_the_repository_s_own_files(tmp_path, monkeypatch, name):
    clone = make_clone(tmp_path / "clone")
    told = "holds the repository's own files, and results would be written over them; choose anoth"
    with pytest.raises(ValueError, match=told):
        start("quick", "shapes10", output_dir=str(clone / name))
    monkeypatch.setenv("ADVLAB_OUTPUT", str(clone / name))
    monkeypatch.chdir(clone)
    with pytest.raises(ValueError, match=told):
        Options("quick", "shapes10").resolved()
    with pytest.raises(ValueError, match=told):
        Options("quick", "shapes10", output_dir=name or ".").resolved()
    assert files.results_folder(clone / "outputs" / "x") == clone / "outputs" / "x"


def make_clone(folder: Path) -> Path:
    """Write what tells a clone of the repository."""
    for name in ("pyproject.toml", "advlab/files.py", "notebooks/01.ipynb", "figures/t.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    assert files.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("ADVLAB_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "somewhere"
    monkeypatch.delenv("ADVLAB_CACHE")
    assert files.cache_dir().name == "advlab"
    monkeypatch.setattr(Path, "home", lambda: Path("~").expanduser())
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # neither HOME nor an account
    with pytest.raises(OSError, match="no home folder; set HOME or ADVLAB_CACHE to a folder"):
        files.cache_dir()


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_bytes(path, b"old")

    def write_half():
        with files.atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
