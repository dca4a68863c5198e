"""A lesson's settings: arguments, environment, folders, what is saved where."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread

from advlab import files, paper, plots, session
from advlab.data import DataError
from advlab.session import start
from advlab.training import FAST, PAPER, QUICK


@pytest.fixture
def quick(empty_home, no_network):
    return start("quick", "shapes10", seed=3, progress=False)


def test_quick_on_shapes10(quick, tmp_path):
    assert quick.profile == "quick"
    assert (quick.data.name, len(quick.data.train), len(quick.data.test)) == (
        "Shapes-10",
        2_000,
        500,
    )
    assert quick.settings.recipe == QUICK
    assert quick.zoo.recipe == QUICK
    assert (quick.zoo.seed, quick.zoo.shipped) == (3, None)
    assert not quick.is_paper_scale
    assert quick.output_dir == tmp_path / "output"
    assert tmp_path / "cache" in quick.zoo.folder.parents
    assert tmp_path / "cache" in quick.cells.parents


def test_session_says_what_it_is(quick):
    text = str(quick)
    assert "profile quick | Shapes-10: 2,000 training and 500 test images" in text
    assert "This is Shapes-10, not CIFAR-10: nothing here compares with the paper." in text
    assert quick.caption() == "Shapes-10, 500 test images, recipe quick, seed 3"
    assert quick.caption(40) == "Shapes-10, 40 test images, recipe quick, seed 3"
    assert quick.caption(0, "robust") == "Shapes-10, recipe robust, seed 3"


def test_environment_is_read_for_auto(empty_home, no_network, monkeypatch):
    monkeypatch.setenv("ADVLAB_PROFILE", "quick")
    monkeypatch.setenv("ADVLAB_DATASET", "shapes10")
    made = start()
    assert (made.profile, made.data.name) == ("quick", "Shapes-10")
    for value in (None, ""):
        assert start(value, value).profile == "quick"


def test_argument_beats_the_environment(empty_home, no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVLAB_PROFILE", "paper")
    monkeypatch.setenv("ADVLAB_DATASET", "cifar10")
    made = start("quick", "shapes10", output_dir=str(tmp_path / "mine"))
    assert (made.profile, made.data.name) == ("quick", "Shapes-10")
    assert made.output_dir == tmp_path / "mine"


def test_wrong_environment_is_named(monkeypatch):
    monkeypatch.setenv("ADVLAB_PROFILE", "slow")
    with pytest.raises(ValueError, match="'slow'; choose one of quick, lesson, fast, paper"):
        start(dataset="shapes10")


def test_lesson_on_cifar10_uses_the_shipped_models(fake_cifar10, empty_home, small_profiles):
    made = start("lesson", "cifar10", data_dir=str(fake_cifar10))
    assert made.zoo.shipped == empty_home / "data" / "checkpoints"
    assert made.settings.recipe == PAPER
    assert made.is_paper_scale
    assert "compares" not in str(made)
    assert len(made.data.train) == 100


@pytest.fixture
def small_profiles(monkeypatch):
    """Let no profile ask for more images than the made-up CIFAR-10 has."""
    small = session.Profile(QUICK, train_n=50, test_n=10)
    monkeypatch.setitem(session.PROFILES, "quick", small)


def test_environment_points_at_the_data(fake_cifar10, empty_home, small_profiles, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    made = start("quick")
    assert made.data.name == "CIFAR-10"
    assert (len(made.data.train), len(made.data.test)) == (50, 10)
    assert not made.is_paper_scale  # the quick recipe
    assert made.zoo.shipped is None


def test_models_of_other_data_lie_elsewhere(fake_cifar10, quick, small_profiles):
    made = start("quick", "cifar10", data_dir=str(fake_cifar10))
    assert made.zoo.folder != quick.zoo.folder


def test_lesson_on_shapes10_ships_nothing(empty_home, no_network):
    made = start("lesson")
    assert made.data.name == "Shapes-10"
    assert made.zoo.shipped is None
    assert made.settings is session.SHAPES_LESSON


@pytest.mark.parametrize(("profile", "recipe"), [("fast", FAST), ("paper", PAPER)])
def test_whole_runs_keep_their_models_with_their_results(
    fake_cifar10, empty_home, tmp_path, profile, recipe
):
    made = start(profile, "cifar10", data_dir=str(fake_cifar10))
    assert made.zoo.folder == tmp_path / "output" / "checkpoints"
    assert (made.zoo.shipped is None) == (profile == "paper")
    assert made.zoo.recipe == recipe
    assert made.is_paper_scale
    assert len(made.data.train) == 100


def test_settings_of_a_profile_depend_on_the_data_for_lesson_alone():
    assert session.settings_of("lesson", "shapes10") is session.SHAPES_LESSON
    assert session.settings_of("lesson", "cifar10") is session.PROFILES["lesson"]
    for name in ("quick", "fast", "paper"):
        for dataset in ("shapes10", "cifar10"):
            assert session.settings_of(name, dataset) is session.PROFILES[name]
    kept = [name for name, profile in session.PROFILES.items() if profile.keep]
    assert kept == ["fast", "paper"]
    assert not session.SHAPES_LESSON.keep


def test_default_output_folder(empty_home, no_network, monkeypatch):
    monkeypatch.delenv("ADVLAB_OUTPUT")
    made = start("quick", "shapes10")
    assert made.output_dir == empty_home / "outputs" / "quick-shapes10"
    assert not made.output_dir.exists()  # nothing is written before something is saved


def test_unknown_settings_are_named(empty_home, no_network):
    with pytest.raises(ValueError, match="unknown profile 'slow'; choose one of quick, lesson"):
        start("slow", "shapes10")
    with pytest.raises(ValueError, match="unknown data set 'mnist'; choose auto, cifar10"):
        start("quick", "mnist")
    with pytest.raises(DataError, match="no folder cifar-10-batches-py in nowhere"):
        start("quick", data_dir="nowhere")


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"seed is .*; it must be an integer from 0 on"):
        start("quick", "shapes10", seed=seed)


@pytest.mark.parametrize("profile", session.PROFILES)
def test_models_are_those_of_the_lessons(profile):
    settings = session.PROFILES[profile]
    wanted = settings.models()
    assert len(wanted) == len(set(wanted))
    assert {("cnn-lstm-positions", 0.0), ("cnn-lstm-positions", 0.2)} <= set(wanted)
    for eps in paper.TABLE_TRAIN_EPS:
        assert {("cnn", eps), ("cnn-lstm", eps)} <= set(wanted)
    assert {eps for arch, eps in wanted if arch == "cnn"} == set(settings.sweep)
    for arch in ("cnn", "cnn-lstm", "cnn-lstm-positions"):  # a robust model needs its baseline
        assert min(wanted.index(m) for m in wanted if m[0] == arch) == wanted.index((arch, 0.0))


def test_paper_profile_has_the_papers_sixteen_models():
    wanted = session.PROFILES["paper"].models()
    assert len(wanted) == 16
    assert {eps for arch, eps in wanted if arch == "cnn"} == set(paper.SWEEP_TRAIN_EPS)


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


def test_home_is_the_clone_with_this_package():
    assert (files.home() / "pyproject.toml").is_file()
    assert files.shipped_checkpoints() == files.home() / "data" / "checkpoints"


def test_home_of_an_installed_wheel_is_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "advlab" / "files.py"))
    monkeypatch.chdir(tmp_path)
    assert files.repository() is None
    assert files.home() == tmp_path


def test_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    assert files.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("ADVLAB_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "somewhere"
    monkeypatch.delenv("ADVLAB_CACHE")
    assert files.cache_dir().name == "advlab"


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
