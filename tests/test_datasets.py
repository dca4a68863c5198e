"""Where images come from: torchvision's sets and their download, and folders of pictures."""

import functools
import gzip
import http.server
import io
import os
import sys
import tarfile
import threading
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR10_CLASSES, draw_pictures, encoded, write_cifar
from PIL import ExifTags, Image

from advlab import datasets, files, models, training
from advlab._torchvision import datasets as torchvision_sets
from advlab.attacks import fgsm
from advlab.data import DataError
from advlab.datasets import folder_key, load, read_picture, resolve
from advlab.forward import evaluate
from advlab.recipes import Recipe

SIZES = (12, 7)  # images of the made-up training and test splits

# --- torchvision's sets, written in their own formats


def drawn(shape, classes):
    """Return random pixels and labels of both splits; the last class is in each."""
    rng = np.random.default_rng(0)
    parts = []
    for n in SIZES:
        labels = rng.integers(0, classes, n)
        labels[0] = classes - 1
        parts.append((rng.integers(0, 256, (n, *shape), dtype=np.uint8), labels))
    return parts


def write(path, content):
    """Write a file; return its MD5 sum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5(content, usedforsecurity=False).hexdigest()


def write_mnist(kind, root, monkeypatch):
    parts = drawn((1, 28, 28), 10)
    arrays = [array.astype(np.uint8) for part in parts for array in (part[0][:, 0], part[1])]
    resources = []
    for (name, _), array in zip(kind.resources, arrays, strict=True):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        content = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
        resources.append((name, write(root / kind.__name__ / "raw" / name, content)))
    monkeypatch.setattr(kind, "resources", resources)
    return parts


def write_svhn(kind, root, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    parts, listed = drawn((3, 32, 32), 10), {}
    for split, (pixels, labels) in zip(("train", "test"), parts, strict=True):
        url, name, _ = kind.split_list[split]
        written, ten = io.BytesIO(), np.where(labels == 0, 10, labels)  # there 0 is written as 10
        savemat(written, {"X": pixels.transpose(2, 3, 1, 0), "y": ten[:, None]})
        listed[split] = [url, name, write(root / name, written.getvalue())]
    monkeypatch.setattr(kind, "split_list", listed)
    return parts


WRITERS = {
    "cifar10": (torchvision_sets.CIFAR10, write_cifar, "cifar-10-batches-py"),
    "fashion-mnist": (torchvision_sets.FashionMNIST, write_mnist, "FashionMNIST"),
    "mnist": (torchvision_sets.MNIST, write_mnist, "MNIST"),
    "svhn": (torchvision_sets.SVHN, write_svhn, "train_32x32.mat and test_32x32.mat"),
    "cifar100": (torchvision_sets.CIFAR100, write_cifar, "cifar-100-python"),
}
every_set = pytest.mark.parametrize("key", WRITERS)


@pytest.fixture
def written(key, tmp_path, monkeypatch):
    """Folder with a made-up set, and what was written there."""
    kind, writer, _ = WRITERS[key]
    root = tmp_path / "made"
    return root, writer(kind, root, monkeypatch)


@every_set
def test_set_is_read_as_it_was_written(key, written, empty_home, no_network):
    root, parts = written
    found = load(key, root)
    assert found.spec.key == key
    assert found.name.lower() == key.replace("cifar", "cifar-")
    assert found.papers == (key == "cifar10")
    assert len(found.classes) == (100 if key == "cifar100" else 10)
    assert key != "cifar10" or found.classes == CIFAR10_CLASSES
    assert found.shape == parts[0][0].shape[1:]
    for split, (pixels, labels) in zip((found.train, found.test), parts, strict=True):
        assert torch.equal(split.images, torch.from_numpy(pixels))
        assert torch.equal(split.labels, torch.from_numpy(labels))
        assert split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
    few = load(key, root, train_n=5, test_n=90)
    assert torch.equal(few.train.images, found.train.images[:5])
    assert len(few.test) == len(found.test)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def page(path):
    path.write_text("\n <!DOCTYPE html><html>not found</html>")


DAMAGES = {truncate: "empty|truncated or altered", alter: "truncated or al", Path.unlink: "missing"}


@every_set
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_of_any_set_is_named(key, damage, written, monkeypatch):
    root, _ = written
    monkeypatch.setattr(datasets.DATASETS[key].kind, "__init__", None)  # nothing is parsed
    for path, _ in datasets.DATASETS[key].listed():
        whole = (root / path).read_bytes()
        damage(root / path)
        told = f"is ({DAMAGES[damage]}).*will not be used"
        for asked in ("auto", key) if key == "cifar10" else (key,):  # Shapes-10 does not stand in
            with pytest.raises(DataError, match=told) as caught:
                load(asked, root)
            assert str(root / path) in str(caught.value)
            for top in WRITERS[key][2].split(" and "):  # both of SVHN's, or nothing is downloaded
                assert str(root / top) in str(caught.value).partition("Delete")[2]
        (root / path).write_bytes(whole)


@every_set
def test_declared_tops_are_where_torchvisions_files_lie(key):
    source = datasets.DATASETS[key]
    assert set(source.tops) == {Path(path).parts[0] for path, _ in source.listed()}


@every_set
def test_absent_set_says_what_to_do(key, empty_home, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "_reachable", lambda *address: asked.append(address))
    tops = WRITERS[key][2]
    with pytest.raises(DataError, match=f"not here, and .* cannot be reached.*that holds {tops},"):
        resolve(key)
    with pytest.raises(DataError, match=f"^no {tops} in .*home, which holds nothing; give the f"):
        resolve(key, empty_home)
    ((host, port),) = asked
    assert host.count(".") >= 2
    assert port == (80 if key in ("fashion-mnist", "svhn") else 443)  # where it answers


@pytest.mark.parametrize("key", ["svhn"])
def test_svhn_without_scipy_names_it(key, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"SVHN cannot be read: .*scipy.*; pip install scipy"):
        load("svhn", written[0])


def test_real_data_have_the_known_sizes(cifar10_root):
    loaded = load("cifar10", cifar10_root)
    assert (len(loaded.train), len(loaded.test)) == (50_000, 10_000)
    assert torch.bincount(loaded.test.labels).tolist() == [1_000] * 10
    assert loaded.classes == CIFAR10_CLASSES


# --- what is kept of a set


@pytest.fixture
def kept(fake_cifar10):
    """Return the made-up CIFAR-10, its folder, and the file in the cache that all processes map."""
    return load("cifar10", fake_cifar10), fake_cifar10, datasets._kept_file("cifar10")


def test_kept_set_is_mapped_and_neither_file_nor_torchvision_is_read(kept, monkeypatch):
    first, root, path = kept
    monkeypatch.delattr(datasets.TorchvisionSet, "kind")
    monkeypatch.delattr(datasets.TorchvisionSet, "check")
    found = load("cifar10", root)
    assert found.spec == first.spec
    assert vars(found)["md5"] == first.md5  # known, and not to be computed again
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if sys.platform == "linux":
        lines = Path("/proc/self/maps").read_text().splitlines()
        lines = [line for line in lines if str(path) in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        for tensor in (found.train.images, found.test.labels):
            assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    found.train.images.zero_()  # stays in this process
    again = load("cifar10", root)
    assert again.md5 == first.md5
    assert torch.equal(again.train.images, first.train.images)


def rename_a_class(path):
    path.write_bytes(path.read_bytes().replace(b"airplane", b"aireplan"))


def empty(path):
    path.write_bytes(b"")


def alter_a_pixel(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


@pytest.mark.parametrize("damage", [truncate, alter, rename_a_class, empty, page, alter_a_pixel])
def test_damaged_kept_set_is_made_anew(kept, damage):
    first, root, path = kept
    whole = path.read_bytes()
    damage(path)
    found = load("cifar10", root)
    assert (found.md5, found.spec) == (first.md5, first.spec)
    assert path.read_bytes() == whole


def test_files_that_were_touched_are_checked_and_other_code_reads_again(kept, monkeypatch):
    first, root, path = kept
    before = path.read_bytes()
    monkeypatch.setattr(datasets, "CODE", "other")
    assert load("cifar10", root).md5 == first.md5
    assert path.read_bytes() != before
    raw = root / datasets.CIFAR10_FOLDER / "data_batch_2"
    os.utime(raw, (1, 1))
    assert load("cifar10", root).md5 == first.md5
    for damage in (alter, Path.unlink):
        damage(raw)
        with pytest.raises(DataError, match=r"data_batch_2 is (trunc|miss).*; it will not be used"):
            load("cifar10", root)


def test_set_is_read_where_nothing_can_be_kept(fake_cifar10, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("ADVLAB_CACHE", str(tmp_path / "file"))
    assert len(load("cifar10", fake_cifar10).train) == 100
    monkeypatch.setattr(files, "cache_dir", lambda: (_ for _ in ()).throw(OSError("no home")))
    assert len(load("cifar10", fake_cifar10).train) == 100


# --- a folder that is set: the data, or an error that says what is there


@pytest.fixture
def said(fake_cifar10, empty_home, no_network, monkeypatch):
    """Sets ADVLAB_DATA to a path of the tests; returns what comes of it."""

    def resolved(place):
        monkeypatch.setenv("ADVLAB_DATA", str(place))
        return resolve("auto")

    return resolved


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("tpyo", "is no folder; give the folder that holds it, or unset ADVLAB_DATA for "),
        ("link", "is a link to nothing;"),
        ("empty", "holds nothing;"),
        ("binary", "holds cifar-10-batches-bin;"),
        ("", r"holds .*; give \S+fake, or unset"),  # one level too deep
    ],
)
def test_variable_that_is_set_and_wrong_is_an_error(said, tmp_path, place, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary" / "cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"^ADVLAB_DATA: no cifar-10-\S+ in \S+, which {told}"):
        said(tmp_path / place)


def test_link_in_place_of_the_set_that_leads_nowhere_is_an_error(said, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / datasets.CIFAR10_FOLDER).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data_batch_1 is missing; it will not be used"):
        load("auto", said(tmp_path / "linked")[1])


@every_set
def test_own_folder_of_a_set_is_accepted(key, written, monkeypatch):
    root, _ = written
    for path, _ in datasets.DATASETS[key].listed():
        for place in (root / path).relative_to(root).parents:
            assert datasets.find(key, root / place) == root
    (root.parent / "link").symlink_to(root / datasets.DATASETS[key].tops[0])
    assert datasets.find(key, root.parent / "link") == root


@pytest.mark.parametrize("itself", [True, False])
def test_intact_archive_is_unpacked_and_a_damaged_one_refused(
    server, said, empty_home, monkeypatch, itself
):
    monkeypatch.setattr(datasets, "_reachable", lambda host, port: False)
    place = server if itself else server.parent
    before = sorted(path.name for path in server.parent.iterdir())
    assert said(place) == ("cifar10", empty_home / "data")
    assert len(load("cifar10").train) == 100
    assert sorted(path.name for path in server.parent.iterdir()) == before  # it is only read
    for damage, told in ((truncate, "is truncated or altered"), (page, "is a web page")):
        damage(server)
        with pytest.raises(DataError, match=rf"{server} {told}.*; it will not be used"):
            said(place)


def test_variable_that_names_the_data_set_is_heeded(monkeypatch):
    monkeypatch.setenv("ADVLAB_DATASET", "shapes10")
    assert resolve() == resolve(None) == resolve("auto") == ("shapes10", None)
    monkeypatch.setenv("ADVLAB_DATASET", "imagenet")
    with pytest.raises(ValueError, match="unknown data set 'imagenet'; choose auto, cifar10"):
        load()


# --- the download, from a server on this machine


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve a folder; return it and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_QuietHandler, directory=str(folder))
    monkeypatch.setattr(datasets, "_reachable", lambda host, port: host == "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture
def server(fake_cifar10, served, monkeypatch):
    """Serve the made-up CIFAR-10 as the archive that torchvision downloads; return its path."""
    archive = served[0] / torchvision_sets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(fake_cifar10 / datasets.CIFAR10_FOLDER, datasets.CIFAR10_FOLDER)
    monkeypatch.setattr(torchvision_sets.CIFAR10, "url", served[1] + archive.name)
    found = md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(torchvision_sets.CIFAR10, "tgz_md5", found)
    return archive


def test_missing_data_are_downloaded_whole(server, empty_home):
    before = datasets.socket.getdefaulttimeout()
    assert resolve("auto") == ("cifar10", empty_home / "data")
    assert [path.name for path in (empty_home / "data").iterdir()] == [datasets.CIFAR10_FOLDER]
    assert len(load("cifar10").train) == 100
    assert datasets.socket.getdefaulttimeout() == before


def test_fashion_mnist_is_downloaded_into_a_folder_of_its_own(served, empty_home, monkeypatch):
    kind = torchvision_sets.FashionMNIST
    parts = write_mnist(kind, served[0], monkeypatch)
    monkeypatch.setattr(kind, "mirrors", [served[1] + "FashionMNIST/raw/"])
    found = load("fashion-mnist")
    assert torch.equal(found.test.images, torch.from_numpy(parts[1][0]))
    assert [path.name for path in (empty_home / "data").iterdir()] == ["FashionMNIST"]


def test_broken_download_leaves_nothing(server, empty_home):
    truncate(server)
    with pytest.raises(DataError, match=r"download of CIFAR-10 from 127.0.0.1 failed"):
        resolve("cifar10")
    assert list((empty_home / "data").iterdir()) == []
    assert resolve("auto") == ("shapes10", None)


def test_interrupted_download_leaves_nothing(server, empty_home, monkeypatch):
    half = []

    def interrupted(self):
        folder = Path(self.root, datasets.CIFAR10_FOLDER)
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(b"half of it")
        half.extend(Path(self.root).parent.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision_sets.CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("auto")
    assert [path.name[:10] for path in half] == [".download-"]
    assert list((empty_home / "data").iterdir()) == []
    assert datasets.find("cifar10") is None


def test_download_into_a_file_names_the_folder_and_the_mend(server, empty_home):
    (empty_home / "data").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write .*data.* choose a folder"):
        resolve("cifar10")


# --- a picture


def palette():
    """Return a picture with a palette whose only colour is transparent."""
    image = Image.new("P", (40, 40), 0)
    image.putpalette([200, 100, 0])
    return encoded(image, transparency=0)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encoded(Image.new("RGB", (40, 40), (200, 100, 0))), (200, 100, 0)),
        (encoded(Image.new("RGB", (40, 40), (200, 100, 0)), "JPEG"), (200, 100, 0)),
        (encoded(Image.new("CMYK", (40, 40), (55, 155, 255, 0)), "JPEG"), (200, 100, 0)),
        (encoded(Image.new("RGB", (40, 40), (200, 100, 0)), "WEBP"), (200, 100, 0)),
        (encoded(Image.new("L", (40, 40), 90)), (90, 90, 90)),
        (encoded(Image.new("1", (40, 40), 1)), (255, 255, 255)),
        (encoded(Image.new("RGBA", (40, 40), (200, 100, 0, 102))), (233, 193, 153)),
        (encoded(Image.new("LA", (40, 40), (90, 0))), (255, 255, 255)),
        (palette(), (255, 255, 255)),
    ],
    ids=["png", "jpeg", "cmyk", "webp", "grey", "bits", "rgba", "grey-alpha", "palette"],
)
def test_any_kind_of_picture_becomes_colour_or_grey(content, colour):
    found = read_picture(content, (3, 32, 32))
    assert (found.shape, found.dtype) == ((3, 32, 32), torch.uint8)
    wanted = torch.tensor(colour)[:, None, None]
    assert int((found.int() - wanted).abs().max()) <= 4
    grey = read_picture(content, (1, 20, 24))
    assert grey.shape == (1, 20, 24)
    red, green, blue = colour
    assert float(grey.float().mean()) == pytest.approx(
        0.299 * red + 0.587 * green + 0.114 * blue, abs=4
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_picture_is_cut_to_its_centre(kind, size):
    picture = Image.new("RGB", size, (0, 0, 255))
    left, top = ((length - 32) // 2 for length in size)
    picture.paste((255, 0, 0), (left, top, left + 32, top + 32))
    content = encoded(picture, kind, quality=100, subsampling=0)
    found = read_picture(content, (3, 32, 32))
    assert int(found[0].min()) > 250
    assert int(found[1:].max()) < 6
    whole = read_picture(content, (3, size[1], size[0]))
    assert int((whole[2] > 128).sum()) == 2 * 32 * 32


def test_picture_is_turned_as_its_camera_was_held():
    picture = Image.new("RGB", (64, 64), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 32, 64))
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned right: its left side is the top
    found = read_picture(encoded(picture, "JPEG", exif=exif), (3, 32, 32))
    assert int(found[:, :14].min()) > 230
    assert int(found[:, 18:].max()) < 26


def damaged_exif():
    """Return a JPEG whose EXIF data hold a text where a number goes, over which Pillow stumbles."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.5
    content = encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif)
    return content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")


DEEP = encoded(Image.fromarray(np.full((40, 40), 20_000, dtype=np.uint16)))
NO_PICTURE = "no PNG, JPEG, BMP, GIF or WEBP picture that can be read"


@pytest.mark.parametrize(
    ("content", "channels", "message"),
    [
        (b"", 3, NO_PICTURE),
        (b"not a picture", 3, NO_PICTURE),
        (encoded(Image.new("RGB", (8, 8)))[:40], 3, NO_PICTURE),
        (damaged_exif(), 3, NO_PICTURE),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), 3, NO_PICTURE),
        (DEEP, 3, "16 bits a pixel; save it with 8"),
        (encoded(Image.new("RGB", (8, 8))), 4, "1 or 3 channels, not 4"),
    ],
    ids=["empty", "text", "cut", "exif", "tiff", "16-bit", "channels"],
)
def test_what_is_no_picture_is_refused(content, channels, message):
    with pytest.raises(ValueError, match=message):
        read_picture(content, (channels, 32, 32))


# --- a folder of pictures


@pytest.fixture
def pets(tmp_path):
    """Folder with pictures of 10 cats and 15 dogs."""
    draw_pictures(tmp_path / "pets", "cat", 10)
    return draw_pictures(tmp_path / "pets", "dog", 15)


def colours(split):
    """Return (label, number) of a split's pictures, as their colours tell, and check the labels."""
    found = split.images[:, :, 0, 0].tolist()
    assert [green // 255 for _, green, _ in found] == split.labels.tolist()
    return [(green // 255, red // 10) for red, green, _ in found]


def test_folder_is_split_by_class_the_same_at_every_call(pets, monkeypatch):
    found = load(f"folder:{pets}")
    assert (found.name, found.classes) == ("folder pets", ("cat", "dog"))
    assert (found.shape, found.papers) == ((3, 32, 32), False)
    assert torch.bincount(found.train.labels).tolist() == [8, 12]
    assert torch.bincount(found.test.labels).tolist() == [2, 3]
    everything = colours(found.train) + colours(found.test)
    assert sorted(everything) == [(0, k) for k in range(10)] + [(1, k) for k in range(15)]
    assert found.train.labels.tolist() != sorted(found.train.labels.tolist())  # they are mixed
    torch.manual_seed(1)
    monkeypatch.chdir(pets.parent)
    assert load("folder:pets").md5 == found.md5
    assert load("folder:./pets/../pets@32").spec == found.spec
    assert Path(found.spec.key).name == found.spec.key == folder_key("folder:pets")
    assert datasets.load_folder(pets, seed=1).md5 != found.md5
    assert len(load(f"folder:{pets}", train_n=3).train) == 3
    assert load(f"folder:{pets}@64").shape == (3, 64, 64)


def test_train_and_test_folders_are_the_splits(tmp_path):
    for name, n in (("cat", 4), ("dog", 3)):
        draw_pictures(tmp_path / "train", name, n)
        draw_pictures(tmp_path / "test", name, 1)
    draw_pictures(tmp_path, "validation", 2)  # passed over
    found = load(f"folder:{tmp_path}")
    assert sorted(colours(found.train)) == [(0, k) for k in range(4)] + [(1, k) for k in range(3)]
    assert sorted(colours(found.test)) == [(0, 0), (1, 0)]
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(DataError, match="must have the same classes; not both: dog, wolf"):
        load(f"folder:{tmp_path}")


def test_hidden_files_and_files_beside_the_classes_are_passed_over(pets):
    before = load(f"folder:{pets}").md5
    for place in (pets / ".cache", pets / "dog" / ".thumbnails"):
        draw_pictures(place, "dog", 1)
    for path in (pets / "cat" / ".DS_Store", pets / "dog" / "._1.png", pets / "README.md"):
        path.write_text("x")
    assert load(f"folder:{pets}").md5 == before
    (pets / "dog" / "puppies").mkdir()
    (pets / "dog" / "0.png").rename(pets / "dog" / "puppies" / "0.png")
    assert len(load(f"folder:{pets}").train) == 20


def spoil(folder, *names, content=b"x"):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: spoil(f, "dog/x.txt"), r"1 of \d+ files .*dog/x.txt \(this is no .*Mend or rem"),
        (lambda f: spoil(f, "cat/x.png", content=DEEP), r"cat/x.png \(.*16 bits a pixel; save it"),
        (
            lambda f: spoil(f, *(f"a/{k}" for k in range(40))),
            r"32 of 52 files (.*a/\d+){5}.*; \.\.",
        ),
        (lambda f: (f / "bird").mkdir(), "has nothing in bird; it must hold one folder"),
        (
            lambda f: draw_pictures(f, "bird", 1),
            "bird holds one picture; a class needs two",
        ),
        (lambda f: (f / "dog").rename(f.parent / "dog"), r"has 1 folder\(s\); .* two classes or"),
        (lambda f: (f / "dog").rename(f / ".dog"), r"has 1 folder\(s\); .* two classes or"),
        (lambda f: f.rename(f.parent / "gone"), "there is no folder .*pets"),
    ],
    ids=["text", "16-bit", "many", "empty", "single", "one-class", "hidden-class", "missing"],
)
def test_folder_that_cannot_be_used_is_refused(pets, change, message):
    change(pets)
    with pytest.raises(DataError, match=message):
        load(f"folder:{pets}")


@pytest.mark.parametrize("size", [0, 15, 513])
def test_size_out_of_range_is_named(pets, size):
    with pytest.raises(DataError, match=f"pictures of {size} pixels a side; choose 16 to 512"):
        load(f"folder:{pets}@{size}")


def test_folder_whose_name_ends_like_a_size_can_be_named(pets):
    pets.rename(pets.parent / "me@2")
    with pytest.raises(DataError, match=r"no folder .*me; for .*me@2, add a size: @2@32"):
        load(f"folder:{pets.parent}/me@2")
    assert load(f"folder:{pets.parent}/me@2@32").name == "folder me@2"


def test_network_learns_real_digits_from_a_folder(tmp_path):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for k, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = tmp_path / str(label) / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 15.9375).astype(np.uint8)).save(path)
    found = load(f"folder:{tmp_path}@16")
    assert found.classes == tuple("0123456789")
    model = models.build("cnn", 0, found.shape, len(found.classes))
    training.fit(model, found.train, Recipe("digits", epochs=4, lr=2e-3, flip=False))
    images, labels = found.test.batch(slice(None))
    correct = evaluate(model, images, labels)[0]
    assert correct > 0.9 * len(labels)
    assert evaluate(model, fgsm(model, images, labels, 0.1), labels)[0] < correct - 0.1 * len(
        labels
    )
