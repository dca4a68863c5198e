"""What a change costs: a new architecture, data set or lesson is one entry, and all find it.

(A new attack is tried in test_evaluation, a new lesson's line of the README in test_readme.)
"""

import hashlib

import torch
from conftest import TINY, write_lesson
from torch import nn

from advlab import catalogue, lab, models
from advlab.checkpoints import load_weights
from advlab.datasets import DATASETS, TorchvisionSet
from advlab.evaluation import accuracy_table
from advlab.models import Architecture
from advlab.store import Zoo
from advlab.upkeep import runs
from advlab.upkeep.tasks import Options


def test_a_new_architecture_is_one_entry(tiny_shapes, tmp_path, monkeypatch):
    def make(classes, shape):
        size = shape[0] * shape[1] * shape[2]
        return nn.Sequential(nn.BatchNorm2d(shape[0]), nn.Flatten(), nn.Linear(size, classes))

    monkeypatch.setitem(models.ARCHITECTURES, "linear", Architecture("one layer", make))
    zoo = Zoo(tiny_shapes, TINY, 0, tmp_path, progress=False)
    trained = zoo.get("linear", 0.1)  # its baseline, and the images that fool it, come first
    assert (tmp_path / "linear-baseline-seed0.safetensors").is_file()
    opened = load_weights(trained.path)
    assert (opened.arch, trained.name) == ("linear", "linear eps=0.1")
    rows = accuracy_table([trained, opened], tiny_shapes, [0.1])
    assert rows["correct"].nunique() == 1


class Stripes(TorchvisionSet):
    """Files of a new kind: all pixels of an image have the label's value."""

    def listed(self):
        return [("stripes.bin", hashlib.md5(b"here").hexdigest())]

    def read(self, root, train):
        labels = torch.arange(24) % 3
        return labels.byte()[:, None, None, None].expand(24, 1, 16, 16), labels, ["a", "b", "c"]


def test_a_new_data_set_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", Stripes("Stripes", "", ("stripes.bin",)))
    (tmp_path / "stripes.bin").write_bytes(b"here")
    lesson = lab.start("quick", "stripes", data_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert (lesson.data.shape, lesson.data.classes) == ((1, 16, 16), ("a", "b", "c"))
    assert lesson.caption().startswith("Stripes, 24 test images, recipe ")
    assert lab.default_output("quick", "stripes").name == "quick-stripes"
    model = models.build("cnn", 0, lesson.data.shape, len(lesson.data.classes))
    assert model(lesson.data.test.batch(slice(None))[0]).shape == (24, 64)


def test_a_new_lesson_is_its_notebook_and_one_entry(empty_home, monkeypatch):
    new = catalogue.Lesson("12_new", "About it", lambda profile: [("cnn", 0.0)], minutes=30)
    monkeypatch.setitem(catalogue.LESSONS, new.name, new)
    write_lesson(empty_home, new.name)
    chosen = runs.choose_lessons(["12"])
    assert list(chosen) == ["12_new"]
    options = Options("quick", "shapes10")
    assert runs.needed_models(chosen, options) == [("cnn", 0.0)]
