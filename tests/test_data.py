"""Batches that are refused, splits, Shapes-10, and which data set is used."""

import shutil
import threading

import pytest
import torch
from conftest import make_batch

from advlab import data, datasets
from advlab.data import DataError, DataSpec, ImageData, Split, check_batch
from advlab.datasets import Shapes10

# --- check_batch


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48), (4, 8, 8), (1, 1, 1)])
def test_good_batches_pass(shape):
    images, labels = make_batch(3, classes=101, shape=shape)
    check_batch(images, labels)
    check_batch(images.bfloat16(), labels)
    images.view(-1)[0], images.view(-1)[1] = 1 + 9e-7, -9e-7
    check_batch(images, labels)


# --- Split and ImageData


def test_split_batch_is_float_in_unit_range(shapes):
    index = torch.tensor([5, 0, 7])
    images, labels = shapes.train.batch(index)
    assert images.dtype == torch.float32
    assert data.to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    assert torch.equal((images * 255).round().byte(), shapes.train.images[index])
    assert torch.equal(labels, shapes.train.labels[index])
    check_batch(images, labels)


def test_what_is_no_split_is_refused(shapes):
    images, labels = shapes.train.images, shapes.train.labels
    floats = images / 255
    # Divided in place, they would fade with every batch.
    with pytest.raises(TypeError, match=r"images are torch\.float32; to_float takes uint8"):
        data.to_float(floats)
    with pytest.raises(TypeError, match=r"split's images are torch\.float32; they must be .*uint8"):
        Split(floats, labels)
    with pytest.raises(TypeError, match=r"split's labels are torch\.int32; they must be .*int64"):
        Split(images, labels.int())
    with pytest.raises(ValueError, match=r"\(160, 3, 32, 32\), its labels \(159,\); they must be"):
        Split(images, labels[1:])


def test_first_takes_the_first_images_and_no_more_than_there_are(shapes):
    part = shapes.train.first(7)
    assert len(part) == 7
    assert torch.equal(part.images, shapes.train.images[:7])
    assert torch.equal(part.labels, shapes.train.labels[:7])
    assert shapes.train.first(None) is shapes.train
    for size in (0, -1, 161):
        with pytest.raises(ValueError, match=f"size is {size}; there are 160 images"):
            shapes.train.first(size)


def test_split_goes_to_a_device_as_a_whole(shapes):
    moved = shapes.test.to("meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert shapes.to("cpu") is shapes  # with its MD5, which takes long to compute


def test_md5_tells_data_apart(shapes):
    spec, train, test = shapes.spec, shapes.train, shapes.test
    other_name = DataSpec("other", "Other", spec.shape, spec.classes)
    assert ImageData(other_name, train, test).md5 == shapes.md5
    images = test.images.clone()
    images[3, 0, 0, 0] ^= 1
    pixel = ImageData(spec, train, Split(images, test.labels))
    assert pixel.md5 != shapes.md5
    assert pixel.test_md5 != shapes.test_md5
    labels = ImageData(spec, Split(train.images, 9 - train.labels), test)
    assert labels.md5 != shapes.md5
    assert labels.test_md5 == shapes.test_md5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: Split(s.images[..., :28], s.labels), r"images are \(3, 32, 28\), not \(3, 32,"),
        (lambda s: Split(s.images, s.labels + 5), "label 14 has no class name"),
        (lambda s: Split(s.images, s.labels - 1), "label -1 has no class name"),
    ],
)
def test_data_that_are_not_as_their_spec_says_are_refused(shapes, change, message):
    for parts in ((change(shapes.train), shapes.test), (shapes.train, change(shapes.test))):
        with pytest.raises(DataError, match=f"Shapes-10: {message}"):
            ImageData(shapes.spec, *parts)


# --- Shapes-10


def test_shapes10_smaller_is_a_prefix_of_larger_whatever_the_random_state():
    torch.manual_seed(1)
    small = Shapes10(120, 40)
    torch.manual_seed(2)
    large = Shapes10(700, 600)
    for split in ("train", "test"):
        few, many = getattr(small, split), getattr(large, split)
        assert torch.equal(few.images, many.images[: len(few)])
        assert torch.equal(few.labels, many.labels[: len(few)])


def test_shapes10_looks_like_cifar10():
    drawn = Shapes10(2_000, 500)
    assert (len(drawn.train), len(drawn.test)) == (2_000, 500)
    assert (drawn.name, drawn.shape, drawn.papers) == ("Shapes-10", (3, 32, 32), False)
    assert len(set(drawn.classes)) == 10
    for split in (drawn.train, drawn.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
    counts = torch.bincount(drawn.train.labels, minlength=10)
    assert counts.min() > 140  # 200 each on average; 4.5 standard deviations
    assert counts.max() < 260
    assert not torch.equal(drawn.train.images[:500], drawn.test.images)
    images = drawn.train.images
    assert len(images.flatten(1).unique(dim=0)) == 2_000
    assert (images.min(), images.max()) == (0, 255)
    assert images.float().std((0, 2, 3)).min() > 30  # every channel is used
    assert (images[:, 0] != images[:, 1]).float().mean() > 0.9  # in colour


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((50_001, 10), "no 50001 images in split 'train'"),
        ((10, 10_001), "no 10001 images in split 'test'"),
        ((0, 10), "no 0 images in split 'train'"),
    ],
)
def test_shapes10_has_from_one_image_to_the_sizes_of_cifar10(sizes, message):
    with pytest.raises(ValueError, match=message):
        Shapes10(*sizes)


# --- which data set


def test_shapes10_needs_nothing_and_stands_in_without_network(empty_home, no_network):
    assert datasets.resolve("shapes10") == datasets.resolve("auto") == ("shapes10", None)
    assert not (empty_home / "data").exists()
    loaded = datasets.load("shapes10", train_n=30, test_n=20)
    assert (loaded.name, len(loaded.train), len(loaded.test)) == ("Shapes-10", 30, 20)


def test_what_is_given_beats_advlab_data_and_that_the_clone_s(
    fake_cifar10, empty_home, no_network, monkeypatch, tmp_path
):
    shutil.copytree(fake_cifar10, empty_home / "data")
    assert datasets.resolve("auto") == ("cifar10", empty_home / "data")
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    assert datasets.resolve("auto") == ("cifar10", fake_cifar10)
    given = tmp_path / "given"
    for dataset in ("auto", "cifar10"):
        with pytest.raises(
            DataError, match=r"^no cifar-10-bat\S+ in .*given, which is no fol.*; give"
        ):
            datasets.resolve(dataset, given)
    (given / datasets.CIFAR10_FOLDER).mkdir(parents=True)
    for dataset in ("auto", "cifar10"):
        for written in (given, str(given)):
            assert datasets.resolve(dataset, written) == ("cifar10", given)


@pytest.mark.parametrize("name", ["imagenet", "folder:", "CIFAR10"])
def test_unknown_data_set_is_named_with_the_choices(name):
    choices = "choose auto, cifar10, shapes10, fashion-mnist, mnist, svhn, cifar100, or folder:PATH"
    with pytest.raises(ValueError, match=f"'{name}'; {choices}"):
        datasets.resolve(name)


def test_the_papers_numbers_are_of_cifar10_alone():
    assert [key for key in (*datasets.DATASETS, "folder:/x") if datasets.are_papers(key)] == [
        "cifar10"
    ]


# --- whether there is a network


def test_open_port_is_reachable_a_closed_one_and_an_unknown_host_are_not():
    with datasets.socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert datasets._reachable("127.0.0.1", port) is True
    assert datasets._reachable("127.0.0.1", port) is False
    assert datasets._reachable("no-such-host.invalid", 443) is False


def test_hanging_look_up_is_given_up(monkeypatch):
    release, ended = threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        release.wait(20)
        ended.set()
        raise OSError("too late")

    monkeypatch.setattr(datasets, "NETWORK_SECONDS", 0.05)
    monkeypatch.setattr(datasets.socket, "create_connection", hang)
    assert datasets._reachable("slow.invalid", 443) is False
    assert not ended.is_set()
    release.set()
