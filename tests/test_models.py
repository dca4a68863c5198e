"""The two architectures: sizes, names, order of layers, sequence readings, initialisation."""

import pytest
import torch
from conftest import assert_same_state
from torch import nn

from advlab import models

# Index of each convolution in the stack of convolution, ReLU, batch norm; shape of its weight.
CONVOLUTION_SHAPES = {
    0: (32, 3, 3, 3),
    3: (32, 32, 3, 3),
    6: (64, 32, 3, 3),
    9: (64, 64, 3, 3),
    12: (64, 64, 3, 3),
    15: (128, 64, 3, 3),
}


def published_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the weights published with the paper."""
    prefix = "network" if arch == "cnn" else "cnn"
    shapes: dict[str, tuple[int, ...]] = {}
    for index, shape in CONVOLUTION_SHAPES.items():
        width = shape[0]
        shapes[f"{prefix}.{index}.weight"] = shape
        shapes[f"{prefix}.{index}.bias"] = (width,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{index + 2}.{name}"] = (width,)
        shapes[f"{prefix}.{index + 2}.num_batches_tracked"] = ()
    if arch == "cnn":
        return shapes | {"network.19.weight": (64, 2048), "network.19.bias": (64,)}
    for layer in range(3):
        shapes[f"lstm.weight_ih_l{layer}"] = (256, 128 if layer == 0 else 64)
        shapes[f"lstm.weight_hh_l{layer}"] = (256, 64)
        shapes[f"lstm.bias_ih_l{layer}"] = shapes[f"lstm.bias_hh_l{layer}"] = (256,)
    return shapes | {"fc.weight": (10, 64), "fc.bias": (10,)}


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
def test_published_state_dict_loads_strictly(arch):
    published = {
        name: torch.full(shape, i / 100) if shape else torch.tensor(7)
        for i, (name, shape) in enumerate(published_shapes(arch).items())
    }
    model = models.build(arch)
    model.load_state_dict(published, strict=True)
    assert_same_state(model, published)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_batch_norm_comes_after_relu(arch):
    model = models.build(arch)
    stack = model.network if arch == "cnn" else model.cnn
    kinds = [type(layer) for layer in stack][:18]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 6


@pytest.mark.parametrize(("arch", "outputs"), [("cnn", 64), ("cnn-lstm", 10)])
def test_logits_have_the_papers_width(arch, outputs, batch):
    with torch.no_grad():
        assert models.build(arch).eval()(batch[0]).shape == (12, outputs)


def steps_of(model: models.CNNLSTM, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the feature map and the time steps that the LSTM is given."""
    seen = {}
    model.cnn.register_forward_hook(lambda *args: seen.update(features=args[2]))
    model.lstm.register_forward_hook(lambda *args: seen.update(steps=args[1][0]))
    with torch.no_grad():
        model.eval()(images)
    return seen["features"], seen["steps"]


def test_channel_groups_step_holds_eight_channels_at_all_positions(batch):
    features, steps = steps_of(models.build("cnn-lstm"), batch[0])
    assert features.shape == (12, 128, 4, 4)
    assert steps.shape == (12, 16, 128)
    for t in range(16):
        assert torch.equal(steps[:, t], features[:, 8 * t : 8 * t + 8].flatten(1))


def test_positions_step_holds_one_position(batch):
    features, steps = steps_of(models.build("cnn-lstm-positions"), batch[0])
    assert steps.shape == (12, 16, 128)
    for t in range(16):
        assert torch.equal(steps[:, t], features[:, :, t // 4, t % 4])


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


def test_build_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = models.build("cnn", 5).state_dict()
    torch.manual_seed(2)
    assert_same_state(models.build("cnn", 5), first)
    other = models.build("cnn", 6).state_dict()
    assert not torch.equal(first["network.0.weight"], other["network.0.weight"])


def test_build_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.build("cnn-lstm", 9)
    assert torch.equal(torch.rand(4), expected)


def test_unknown_architecture_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'resnet'.*cnn, cnn-lstm, cnn-lstm-positions"):
        models.build("resnet")


def test_unknown_sequence_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'rows'.*channel_groups, positions"):
        models.CNNLSTM(sequence="rows")
