"""The two architectures: sizes, names, order of layers, sequence readings, initialisation."""

import pytest
import torch
from conftest import assert_same_state, make_batch
from torch import nn

from advlab import models


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (models.CNN(), 308_256),
        (models.CNN(num_outputs=10), 197_610),
        (models.CNNLSTM(), 293_994),
        (models.CNNLSTM(sequence="positions"), 293_994),
    ],
    ids=["cnn", "cnn-10-outputs", "cnn-lstm", "positions"],
)
def test_parameter_counts_are_the_papers(model, count):
    assert models.count_parameters(model) == count


def test_count_parameters_leaves_out_frozen_ones():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert models.count_parameters(model) == 12


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_batch_norm_comes_after_relu(arch):
    model = models.build(arch)
    stack = model.network if arch == "cnn" else model.cnn
    kinds = [type(layer) for layer in stack][:18]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 6


# The positions of the last feature map: that is the paper's for 28x28 pixels too.
POSITIONS = {(3, 32, 32): 16, (1, 28, 28): 16, (3, 64, 48): 48, (3, 64, 64): 64, (4, 8, 8): 1}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("shape", POSITIONS)
@pytest.mark.parametrize(("classes", "of_cnn"), [(2, 64), (10, 64), (64, 64), (101, 101)])
def test_any_image_and_any_number_of_classes(arch, shape, classes, of_cnn):
    model = models.build(arch, 0, shape, classes).eval()
    images, _ = make_batch(3, shape=shape)
    with torch.no_grad():
        features = (model.network[:18] if arch == "cnn" else model.cnn)(images)
        logits = model(images)
    assert features.shape[1] == 128
    assert features[0, 0].numel() == models.positions(shape) == POSITIONS[shape]
    assert logits.shape == (3, of_cnn if arch == "cnn" else classes)
    if arch != "cnn":
        assert steps_of(model, images)[1].shape == (3, POSITIONS[shape], 128)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((28, 28), 10, r"shape is \(28, 28\); it must be \(channels, height, width\)"),
        ((3, 0, 32), 10, r"shape is \(3, 0, 32\); it must be"),
        ((0, 32, 32), 10, r"shape is \(0, 32, 32\); it must be"),
        ((3, 32, 32), 1, "classes is 1; a classifier needs at least 2"),
        ((3, 32, 32), -5, "classes is -5; a classifier needs at least 2"),
    ],
)
@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_impossible_shapes_and_classes_are_refused(arch, shape, classes, message):
    with pytest.raises(ValueError, match=message):
        models.build(arch, 0, shape, classes)


def steps_of(model: models.CNNLSTM, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the feature map and the time steps that the LSTM is given."""
    seen = {}
    model.cnn.register_forward_hook(lambda *args: seen.update(features=args[2]))
    model.lstm.register_forward_hook(lambda *args: seen.update(steps=args[1][0]))
    with torch.no_grad():
        model.eval()(images)
    return seen["features"], seen["steps"]


def test_step_holds_eight_channels_at_all_positions_or_all_at_one(batch):
    features, groups = steps_of(models.build("cnn-lstm"), batch[0])
    its_own, positions = steps_of(models.build("cnn-lstm-positions"), batch[0])
    assert features.shape == (12, 128, 4, 4)
    assert groups.shape == positions.shape == (12, 16, 128)
    for t in range(16):
        assert torch.equal(groups[:, t], features[:, 8 * t : 8 * t + 8].flatten(1))
        assert torch.equal(positions[:, t], its_own[:, :, t // 4, t % 4])


@pytest.mark.parametrize("arch", ["cnn-lstm", "cnn-lstm-positions"])
def test_reading_does_not_depend_on_memory_format(arch, batch):
    model = models.build(arch).eval()
    with torch.no_grad():
        plain = model(batch[0])
        channels_last = model(batch[0].contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, channels_last, rtol=1e-4, atol=1e-6)


def test_lstm_logits_come_from_the_last_step(batch):
    model = models.build("cnn-lstm").eval()
    seen = {}
    model.lstm.register_forward_hook(lambda *args: seen.update(outputs=args[2][0]))
    with torch.no_grad():
        logits = model(batch[0])
        assert torch.equal(logits, model.fc(seen["outputs"][:, 15]))


def test_build_depends_on_the_seed_alone_and_leaves_the_random_state():
    torch.manual_seed(1)
    first = models.build("cnn", 5).state_dict()
    torch.manual_seed(2)
    expected = torch.rand(4)
    torch.manual_seed(2)
    assert_same_state(models.build("cnn", 5), first)
    assert torch.equal(torch.rand(4), expected)
    other = models.build("cnn", 6).state_dict()
    assert not torch.equal(first["network.0.weight"], other["network.0.weight"])


def test_unknown_architecture_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'resnet'.*cnn, cnn-lstm, cnn-lstm-positions"):
        models.build("resnet")


def test_unknown_sequence_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'rows'.*channel_groups, positions"):
        models.CNNLSTM(sequence="rows")
