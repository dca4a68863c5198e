"""Checkpoints: round trips, every kind of bad file, anybody's weights."""

import functools
import io
import os
import pickle

import pytest
import safetensors.torch
import torch
from conftest import assert_same_state, make_small_cnn

from advlab import checkpoints, models
from advlab.checkpoints import CheckpointError, load, load_weights, save, weights_hash


def metadata_of(model, **more):
    return {"arch": "cnn", "train_eps": 0.0, "seed": 0, "weights_hash": weights_hash(model), **more}


@pytest.fixture
def saved(tmp_path):
    """A file of an untrained CNN, with the model."""
    model = models.build("cnn", 3)
    path = tmp_path / "models" / "one.safetensors"
    save(model, metadata_of(model, history=[{"epoch": 1, "train_loss": 2.5}]), path)
    return path, model


def test_saved_model_and_metadata_come_back(saved):
    path, model = saved
    checkpoint = load(path)
    assert_same_state(checkpoint.model, model.state_dict())
    assert not checkpoint.model.training
    assert checkpoint.path == path
    assert checkpoint.history == [{"epoch": 1, "train_loss": 2.5}]
    assert checkpoint.metadata["arch"] == "cnn"
    assert checkpoints.read_metadata(path) == checkpoint.metadata


def test_hash_is_of_every_weight_and_buffer():
    model = make_small_cnn()
    first = weights_hash(model)
    assert weights_hash(make_small_cnn()) == first
    for name, tensor in model.state_dict().items():
        old = tensor.clone()
        tensor.add_(1)
        assert weights_hash(model) != first, name
        tensor.copy_(old)
    assert weights_hash(model.to(memory_format=torch.channels_last)) == first
    assert weights_hash(model.bfloat16()) != first


# --- bad files


def test_truncated_file_is_refused(saved):
    path, _ = saved
    content = path.read_bytes()
    for size in (5, 500, len(content) - 1):
        path.write_bytes(content[:size])
        for read in (load, functools.partial(load_weights, arch="cnn")):
            with pytest.raises(CheckpointError, match=r"one.safetensors is damaged or no safetens"):
                read(path)


PICKLED = io.BytesIO()
torch.save({"w": torch.ones(3)}, PICKLED)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty, no weights"),
        (b"<!DOCTYPE html>\n<html>404</html>", "is a web page, no weights"),
        (b"\n<html lang=en>", "is a web page, no weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"hello", "is no weights file"),
        (PICKLED.getvalue()[:-50], "is damaged, perhaps cut off; get it again"),
    ],
    ids=["empty", "page", "html", "lfs", "text", "cut"],
)
def test_file_that_is_no_weights_is_called_what_it_is(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    if name.endswith("safetensors"):
        told = told.replace("is no weights file", "is damaged").partition(",")[0]
    with pytest.raises(CheckpointError, match=rf"{name} (is refused: it )?{told}") as caught:
        load_weights(tmp_path / name, "cnn")
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "model.pth", "model.bin"])
def test_safetensors_are_read_whatever_their_name(saved, name):
    path, model = saved
    renamed = path.rename(path.with_name(name))
    found = load_weights(renamed)
    assert found.arch == "cnn"
    assert_same_state(found.model, model.state_dict())


def test_one_altered_byte_of_the_weights_is_refused(saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was altered: .* Delete it and get it again"):
        load(path)


def test_foreign_safetensors_are_refused_with_the_way_to_try_them(tmp_path):
    model = models.build("cnn")
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"foreign file.*advlab evaluate FILE --arch"):
        load(path)
    assert_same_state(load_weights(path, "cnn").model, model.state_dict())


@pytest.mark.parametrize(
    "metadata",
    [
        {"weights_hash": ""},
        {"arch": "resnet"},
        {"arch": ["cnn"]},
        {"arch": "cnn", "shape": [3]},
        {"arch": "cnn", "shape": "rgb"},
        {"arch": "cnn", "classes": 1},
        {"arch": "cnn", "classes": None},
    ],
    ids=str,
)
def test_metadata_that_describe_no_model_of_ours_are_refused(tmp_path, metadata):
    path = tmp_path / "odd.safetensors"
    save(models.build("cnn"), metadata, path)
    for read in (load, load_weights):
        with pytest.raises(CheckpointError, match=r"odd\.safetensors does not say wh"):
            read(path)


@pytest.mark.parametrize("text", ['{"arch": "cnn"', "", "[1]", '"cnn"', "nothing"])
def test_damaged_metadata_are_named(tmp_path, text):
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(models.build("cnn").state_dict(), path, {"advlab": text})
    for read in (load, checkpoints.read_metadata, functools.partial(load_weights, arch="cnn")):
        with pytest.raises(CheckpointError, match=r"odd\.safetensors is damaged"):
            read(path)


@pytest.mark.parametrize("arch", ["cnn", "cnn-lstm"])
def test_shape_and_classes_come_back_from_the_file(tmp_path, arch):
    shape, classes = (1, 28, 28), 70
    model = models.build(arch, 1, shape, classes)
    ours, theirs = tmp_path / "grey.safetensors", tmp_path / "grey.pth"
    about = metadata_of(model, shape=shape, classes=classes) | {"arch": arch}
    save(model, about, ours)
    torch.save(model.state_dict(), theirs)
    for found in (
        load(ours),
        load_weights(ours),
        load_weights(ours, arch),
        load_weights(theirs, arch, shape, classes),
    ):
        assert_same_state(found.model, model.state_dict())
        assert found.model(torch.rand(2, *shape)).shape == (2, 70)
    with pytest.raises(
        CheckpointError, match=r"of another shape .*\.0\.weight \(32, 1, 3, 3\), not"
    ):
        load_weights(theirs, arch)


def test_architecture_is_read_from_our_own_file(tmp_path):
    # The weights of both readings of the LSTM have the same names and shapes.
    path, model = tmp_path / "p.safetensors", models.build("cnn-lstm-positions", 2)
    save(model, metadata_of(model) | {"arch": "cnn-lstm-positions"}, path)
    with pytest.raises(
        CheckpointError, match=r"is of the architecture cnn-lstm-pos.*, not cnn-lst"
    ):
        load_weights(path, "cnn-lstm")
    for found in (load_weights(path), load_weights(path, "cnn-lstm-positions"), load(path)):
        assert (found.arch, found.model.sequence) == ("cnn-lstm-positions", "positions")
        assert_same_state(found.model, model.state_dict())
    foreign = tmp_path / "p.pth"
    torch.save(model.state_dict(), foreign)
    with pytest.raises(
        CheckpointError, match=r"p\.pth does not say which .*; give --arch, one of cnn"
    ):
        load_weights(foreign)


def test_wrong_architecture_is_refused_with_the_names_that_differ(saved, tmp_path):
    path, model = saved
    save(model, metadata_of(model) | {"arch": "cnn-lstm"}, path)
    theirs, ten = tmp_path / "cnn.pth", tmp_path / "ten.pth"
    torch.save(model.state_dict(), theirs)
    counts = [len(one.state_dict()) for one in (models.build("cnn-lstm"), model)]
    told = (
        r"does not fit .*: weights {} missing \(cnn.0.weight, cnn.0.bias, cnn.2.weight, \.\.\.\); "
    )
    told += r"{} not of this model \((network\.[\w.]+, ){{3}}\.\.\.\)$"
    for read in (load, load_weights, lambda _: load_weights(theirs, "cnn-lstm")):
        with pytest.raises(CheckpointError, match=told.format(*counts)):
            read(path)
    torch.save(models.CNN(num_outputs=10).state_dict(), ten)
    with pytest.raises(CheckpointError) as caught:
        load_weights(ten, "cnn")
    shapes = "network.19.weight (10, 2048), not (64, 2048), network.19.bias (10,), not (64,)"
    assert str(caught.value).endswith(f"architecture: weights 2 of another shape ({shapes})")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = models.build("cnn")
    model.network[0].weight.data[0, 0, 0, 0] = value
    ours, theirs = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save(model, metadata_of(model), ours)
    torch.save(model.state_dict(), theirs)
    for read in (lambda: load(ours), lambda: load_weights(theirs, "cnn")):
        with pytest.raises(CheckpointError, match="not finite numbers; get it again"):
            read()


class _Payload:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, writer):
    proof = tmp_path / "ran"
    payload = {"network.0.weight": _Payload(f"touch {proof}")}
    path = tmp_path / "evil.pth"
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match=r"evil.pth is refused: .* could run code"):
        load_weights(path, "cnn")
    assert not proof.exists()
    # It is a real one: without the protection it runs.
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists()


PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.")


@pytest.mark.parametrize("prefix", [*PREFIXES, "model.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
def test_what_others_put_around_weights_is_taken_off(tmp_path, wrapper, prefix):
    model = models.build("cnn", 4)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "theirs.pth"
    torch.save(state if wrapper is None else {"epoch": 9, "acc": 0.9, wrapper: state}, path)
    paths = [path]
    if wrapper is None:
        paths.append(path.with_suffix(".safetensors"))
        safetensors.torch.save_file(state, paths[1])
    for path in paths:
        found = load_weights(path, "cnn")
        assert_same_state(found.model, model.state_dict())
        assert not found.model.training
    unknown = {"arch": "cnn", "weights_hash": weights_hash(model), "train_eps": None, "seed": None}
    assert unknown.items() <= found.metadata.items()


def test_prefix_of_some_names_alone_is_left_on(tmp_path):
    state = models.build("cnn").state_dict()
    state["module.network.0.bias"] = state.pop("network.0.bias")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(network.0.bias\); 1 not of this model"):
        load_weights(tmp_path / "odd.pth", "cnn")


CONTENTS = [[1, 2], {"epoch": 3}, {"model": [1]}, {"state_dict": {"w": 1}}, torch.ones(2), None]


@pytest.mark.parametrize("content", CONTENTS, ids=str)
def test_pth_that_is_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"odd.pth holds no state dict"):
        load_weights(path, "cnn")


def test_missing_file_no_pickle_and_unknown_architecture_are_named(tmp_path):
    path = tmp_path / "text.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*text.pth"):
        load_weights(path, "cnn")
    path.write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pth is refused: it is no weights file"):
        load_weights(path, "cnn")
    torch.save(models.build("cnn").state_dict(), path)
    with pytest.raises(ValueError, match="unknown architecture 'resnet'; choose one of cnn"):
        load_weights(path, "resnet")
