"""Data: what is checked, Shapes-10, which data set is used, damaged and interrupted downloads."""

import functools
import http.server
import math
import tarfile
import threading

import pytest
import torch
from conftest import make_batch, write_fake_cifar10

from advlab import data
from advlab.data import DataError, Shapes10, Split, check_batch

# --- check_batch


def test_good_batches_pass():
    images, labels = make_batch(3)
    check_batch(images, labels)
    check_batch(images.bfloat16(), labels)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 1 + 9e-7, -9e-7
    check_batch(images, labels)


IMAGES, LABELS = make_batch(4)


def spoilt(value: float) -> torch.Tensor:
    images = IMAGES.clone()
    images[2, 1, 5, 5] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        ((IMAGES * 255).byte(), LABELS, TypeError, r"torch.uint8; give a float.*to_float"),
        (IMAGES.numpy(), LABELS, TypeError, r"images are ndarray; give a float"),
        (IMAGES[0], LABELS[:1], ValueError, r"\(3, 32, 32\); it must be \(N, 3, 32, 32\)"),
        (IMAGES[:, :1], LABELS, ValueError, r"\(4, 1, 32, 32\); it must be"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, ValueError, r"\(4, 32, 32, 3\); it must be"),
        (IMAGES[..., :28], LABELS, ValueError, r"\(4, 3, 32, 28\); it must be"),
        (IMAGES[:0], LABELS[:0], ValueError, "batch is empty; give at least one"),
        (IMAGES, LABELS.int(), TypeError, r"torch.int32; give an int64 tensor \(labels.long"),
        (IMAGES, LABELS.float(), TypeError, r"torch.float32; give an int64"),
        (IMAGES, LABELS.tolist(), TypeError, "labels are list; give an int64"),
        (IMAGES, LABELS[:3], ValueError, r"shape \(3,\) for 4 images; it must be \(4,\)"),
        (IMAGES, LABELS[:, None], ValueError, r"shape \(4, 1\) for 4 images"),
        (IMAGES, LABELS - 20, ValueError, r"label -\d+ is negative; labels count from 0"),
        (spoilt(1.001), LABELS, ValueError, r"to 1\.001; they must lie in \[0, 1\]"),
        (spoilt(-0.5), LABELS, ValueError, r"range from -0\.5 .*normalise inside the model"),
        (spoilt(math.nan), LABELS, ValueError, "nan; they must lie in .* hold no NaN"),
        (spoilt(math.inf), LABELS, ValueError, "to inf; they must lie"),
        (IMAGES * 255, LABELS, ValueError, "Divide 8-bit images by 255"),
    ],
    ids=[
        *("uint8", "numpy", "rank", "grey", "channels-last", "width", "empty", "int32", "float"),
        *("list", "length", "column", "negative", "above", "below", "nan", "inf", "8-bit"),
    ],
)
def test_bad_batches_are_refused_with_value_and_mend(images, labels, error, message):
    with pytest.raises(error, match=message):
        check_batch(images, labels)


# --- Split


def test_split_batch_is_float_in_unit_range(shapes):
    index = torch.tensor([5, 0, 7])
    images, labels = shapes.train.batch(index)
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round().byte(), shapes.train.images[index])
    assert torch.equal(labels, shapes.train.labels[index])
    check_batch(images, labels)


def test_to_float_maps_0_and_255_to_the_ends():
    assert data.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [
        0.0,
        pytest.approx(0.2),
        1.0,
    ]


def test_first_takes_the_first_images(shapes):
    part = shapes.train.first(7)
    assert len(part) == 7
    assert torch.equal(part.images, shapes.train.images[:7])
    assert torch.equal(part.labels, shapes.train.labels[:7])
    assert shapes.train.first(None) is shapes.train


@pytest.mark.parametrize("size", [0, -1, 161])
def test_first_refuses_more_than_there_is(shapes, size):
    with pytest.raises(ValueError, match=f"size is {size}; there are 160 images"):
        shapes.train.first(size)


def test_md5_tells_data_apart(shapes):
    again = data.ImageData("other name", shapes.classes, shapes.train, shapes.test)
    assert again.md5 == shapes.md5
    images = shapes.test.images.clone()
    images[3, 0, 0, 0] ^= 1
    pixel = data.ImageData("x", shapes.classes, shapes.train, Split(images, shapes.test.labels))
    assert pixel.md5 != shapes.md5
    assert pixel.test_md5 != shapes.test_md5
    labels = data.ImageData(
        "x", shapes.classes, Split(shapes.train.images, 9 - shapes.train.labels), shapes.test
    )
    assert labels.md5 != shapes.md5
    assert labels.test_md5 == shapes.test_md5


# --- Shapes-10


def test_shapes10_is_deterministic():
    torch.manual_seed(1)
    first = Shapes10(300, 100)
    torch.manual_seed(2)
    assert Shapes10(300, 100).md5 == first.md5


def test_shapes10_smaller_is_a_prefix_of_larger():
    small, large = Shapes10(120, 40), Shapes10(700, 600)
    for split in ("train", "test"):
        few, many = getattr(small, split), getattr(large, split)
        assert torch.equal(few.images, many.images[: len(few)])
        assert torch.equal(few.labels, many.labels[: len(few)])


def test_shapes10_looks_like_cifar10():
    shapes = Shapes10(2_000, 500)
    assert (len(shapes.train), len(shapes.test)) == (2_000, 500)
    assert shapes.name == "Shapes-10"
    assert len(set(shapes.classes)) == 10
    for split in (shapes.train, shapes.test):
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
    counts = torch.bincount(shapes.train.labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 140  # 200 each on average; 4.5 standard deviations
    assert counts.max() < 260


def test_shapes10_images_vary():
    images = Shapes10(1_000, 10).train.images
    assert len(images.flatten(1).unique(dim=0)) == 1_000
    assert images.min() == 0
    assert images.max() == 255
    assert images.float().std((0, 2, 3)).min() > 30  # every channel is used
    assert (images[:, 0] != images[:, 1]).float().mean() > 0.9  # in colour


def test_shapes10_splits_differ():
    shapes = Shapes10(100, 100)
    assert not torch.equal(shapes.train.images, shapes.test.images)


def test_shapes10_has_the_sizes_of_cifar10_at_most():
    with pytest.raises(ValueError, match=r"no 50001 images in split 'train'"):
        Shapes10(50_001, 10)
    with pytest.raises(ValueError, match=r"no 10001 images in split 'test'"):
        Shapes10(10, 10_001)


def test_shapes10_refuses_size_zero(monkeypatch):
    monkeypatch.setitem(data.shapes.SIZES, "train", 50)
    with pytest.raises(ValueError, match="0"):
        Shapes10(0, 10)


# --- which data set


def test_explicit_shapes10_needs_nothing(empty_home, no_network):
    assert data.resolve("shapes10") == ("shapes10", None)
    loaded = data.load("shapes10", train_n=30, test_n=20)
    assert (loaded.name, len(loaded.train), len(loaded.test)) == ("Shapes-10", 30, 20)


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_data_dir_is_used(dataset, fake_cifar10, empty_home, no_network):
    assert data.resolve(dataset, fake_cifar10) == ("cifar10", fake_cifar10)
    assert data.resolve(dataset, str(fake_cifar10)) == ("cifar10", fake_cifar10)


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_data_dir_without_data_is_refused(dataset, tmp_path, no_network):
    with pytest.raises(DataError, match=r"no folder cifar-10-batches-py in .*nothing; give"):
        data.resolve(dataset, tmp_path / "nothing")


def test_advlab_data_is_used(fake_cifar10, empty_home, no_network, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    assert data.resolve("auto") == ("cifar10", fake_cifar10)


def test_data_in_the_clone_is_used(empty_home, no_network, monkeypatch):
    root = write_fake_cifar10(empty_home / "data", monkeypatch)
    assert data.resolve("auto") == ("cifar10", root)


def test_data_dir_beats_advlab_data(fake_cifar10, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / data.CIFAR10_FOLDER).mkdir(parents=True)
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    assert data.resolve("auto", other) == ("cifar10", other)


def test_auto_falls_back_to_shapes10_without_network(empty_home, no_network):
    assert data.resolve("auto") == ("shapes10", None)
    assert not (empty_home / "data").exists()


def test_cifar10_without_network_says_what_to_do(empty_home, no_network):
    with pytest.raises(
        DataError, match=r"not here, and .* cannot be reached.*Set ADVLAB_DATA.*shapes10"
    ):
        data.resolve("cifar10")


def test_unknown_data_set_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'mnist'; choose auto, cifar10, shapes10"):
        data.resolve("mnist")


def test_unresolvable_host_is_not_reachable():
    assert data._reachable("no-such-host.invalid") is False


def test_closed_port_is_not_reachable(monkeypatch):
    # Port 443 of this machine may be open; 127.0.0.1 is asked on a port that was just closed.
    connect = data.socket.create_connection
    with data.socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(
        data.socket, "create_connection", lambda address, **kw: connect((address[0], port), **kw)
    )
    assert data._reachable("127.0.0.1") is False


def test_hanging_look_up_is_given_up(monkeypatch):
    release, ended = threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        release.wait(20)
        ended.set()
        raise OSError("too late")

    monkeypatch.setattr(data, "NETWORK_SECONDS", 0.05)
    monkeypatch.setattr(data.socket, "create_connection", hang)
    assert data._reachable("slow.invalid") is False
    assert not ended.is_set()
    release.set()


# --- CIFAR-10's files


def test_cifar10_is_parsed_as_torchvision_does(fake_cifar10):
    loaded = data.load_cifar10(fake_cifar10)
    assert loaded.name == "CIFAR-10"
    assert loaded.classes == tuple(data.datasets.CIFAR10(fake_cifar10).classes)
    assert loaded.train.images.shape == (100, 3, 32, 32)
    assert loaded.test.images.shape == (20, 3, 32, 32)
    theirs = data.datasets.CIFAR10(fake_cifar10, train=False)
    for i in (0, 19):
        image, label = theirs[i]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        assert torch.equal(loaded.test.images[i].permute(1, 2, 0).flatten(), pixels)
        assert int(loaded.test.labels[i]) == label
    part = data.load("cifar10", fake_cifar10, train_n=10, test_n=5)
    assert torch.equal(part.train.images, loaded.train.images[:10])
    assert len(part.test) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize(
    ("damage", "state"),
    [(truncate, "truncated or altered"), (alter, "truncated or altered"), (None, "is missing")],
)
def test_damaged_file_is_named_and_nothing_loaded(fake_cifar10, monkeypatch, name, damage, state):
    path = fake_cifar10 / data.CIFAR10_FOLDER / name
    damage(path) if damage else path.unlink()
    parsed = []
    monkeypatch.setattr(
        data.datasets,
        "CIFAR10",
        type(
            "Spy",
            (data.datasets.CIFAR10,),
            {"__init__": lambda self, *args, **kw: parsed.append(args)},
        ),
    )
    with pytest.raises(DataError, match=rf"{name} {state}|{name} is {state}") as caught:
        data.load("auto", fake_cifar10)
    assert str(path) in str(caught.value)
    assert "will not be used. Delete" in str(caught.value)
    assert not parsed


def test_truncated_file_of_the_real_data_is_named(cifar10_root, tmp_path):
    folder = tmp_path / data.CIFAR10_FOLDER
    folder.mkdir()
    for path in (cifar10_root / data.CIFAR10_FOLDER).iterdir():
        (folder / path.name).symlink_to(path.resolve())
    data.check_files(tmp_path)
    content = (folder / "data_batch_1").read_bytes()
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_1").write_bytes(content[:-1])
    with pytest.raises(DataError, match="data_batch_1 is truncated or altered"):
        data.load("auto", tmp_path)


def test_real_data_have_the_known_sizes(cifar10_root):
    loaded = data.load("cifar10", cifar10_root)
    assert (len(loaded.train), len(loaded.test)) == (50_000, 10_000)
    assert loaded.train.images.dtype == torch.uint8
    assert torch.bincount(loaded.test.labels).tolist() == [1_000] * 10
    assert loaded.classes == data.CIFAR10_CLASSES


# --- the download, from a server on this machine


@pytest.fixture
def server(fake_cifar10, tmp_path, monkeypatch):
    """Serve the made-up CIFAR-10 as the archive that torchvision downloads; return its path."""
    folder = tmp_path / "served"
    folder.mkdir()
    archive = folder / data.datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(fake_cifar10 / data.CIFAR10_FOLDER, data.CIFAR10_FOLDER)
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/{archive.name}"
        monkeypatch.setattr(data.datasets.CIFAR10, "url", url)
        md5 = data.hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(data.datasets.CIFAR10, "tgz_md5", md5)
        monkeypatch.setattr(data, "_reachable", lambda host: host == "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield archive
        running.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_missing_data_are_downloaded_whole(server, empty_home):
    assert data.resolve("auto") == ("cifar10", empty_home / "data")
    assert [path.name for path in (empty_home / "data").iterdir()] == [data.CIFAR10_FOLDER]
    assert len(data.load("cifar10").train) == 100


def test_broken_download_leaves_nothing(server, empty_home):
    truncate(server)
    with pytest.raises(DataError, match=r"download of CIFAR-10 from 127.0.0.1 failed"):
        data.resolve("cifar10")
    assert list((empty_home / "data").iterdir()) == []
    assert data.resolve("auto") == ("shapes10", None)


def test_interrupted_download_leaves_nothing(server, empty_home, monkeypatch):
    half = []

    def interrupted(self):
        folder = data.Path(self.root, data.CIFAR10_FOLDER)
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(b"half of it")
        half.extend(data.Path(self.root).parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(data.datasets.CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.resolve("auto")
    assert [path.name[:10] for path in half] == [".download-"]
    assert list((empty_home / "data").iterdir()) == []
    assert data.find_cifar10() is None


def test_download_gives_the_socket_timeout_back(server, empty_home):
    before = data.socket.getdefaulttimeout()
    data.resolve("cifar10")
    assert data.socket.getdefaulttimeout() == before


def test_download_into_a_file_names_the_folder_and_the_mend(server, empty_home):
    (empty_home / "data").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write .*data.* choose a folder"):
        data.resolve("cifar10")
