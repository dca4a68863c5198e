"""The paper's two architectures (paper, section 6; sizes and names from its published weights).

Images are float tensors (N, C, H, W) in [0, 1], (3, 32, 32) in the paper; there is no normalisation
layer, because each convolution is followed by ReLU and *then* batch normalisation, which rescales
for the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advlab.data import check_name

# (output channels, stride) of the six 3x3 convolutions that both models share.
CONVOLUTIONS = ((32, 1), (32, 2), (64, 1), (64, 2), (64, 1), (128, 2))
SEQUENCES = ("channel_groups", "positions")
CIFAR_SHAPE = (3, 32, 32)
Shape = tuple[int, int, int]


def convolutions(channels: int = 3) -> list[nn.Module]:
    """Return the shared stack for images of `channels`: six times convolution, ReLU, batch norm."""
    layers: list[nn.Module] = []
    for outputs, stride in CONVOLUTIONS:
        layers += [
            nn.Conv2d(channels, outputs, kernel_size=3, stride=stride, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(outputs),
        ]
        channels = outputs
    return layers


def positions(shape: Shape) -> int:
    """Return how many positions the last feature map has: 16 for 32x32 pixels, and for 28x28.

    Raises:
        ValueError: if `shape` is no (channels, height, width).
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape is {shape}; it must be (channels, height, width)")
    height, width = shape[1:]
    for _, stride in CONVOLUTIONS:
        height, width = -(-height // stride), -(-width // stride)
    return height * width


class CNN(nn.Module):
    """The paper's CNN (section 6.2): 308,256 parameters with its 64 outputs.

    Args:
        num_outputs: Width of the last layer. The paper's 64 "neurons" are the logits themselves:
            ten of them have a label, 54 never do. With 10 outputs the model has 197,610 parameters.
        shape: (C, H, W) of an image.
    """

    memory_format = torch.channels_last

    def __init__(self, num_outputs: int = 64, shape: Shape = CIFAR_SHAPE) -> None:
        super().__init__()
        width = CONVOLUTIONS[-1][0] * positions(shape)
        self.network = nn.Sequential(
            *convolutions(shape[0]), nn.Flatten(), nn.Linear(width, num_outputs)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_outputs)."""
        return self.network(images)


class CNNLSTM(nn.Module):
    """The paper's CNN-LSTM hybrid (section 6.3): 293,994 parameters.

    Args:
        num_classes: Width of the last layer.
        sequence: How the (128, h, w) feature map becomes h * w time steps of 128 numbers, 16 of
            them for 32x32 pixels. ``"channel_groups"`` is the paper's ``reshape(N, 16, 128)``: a
            step holds 8 channels at all 16 positions. ``"positions"`` makes a step one position
            with all 128 channels.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: if `sequence` is neither.
    """

    memory_format = torch.channels_last

    def __init__(
        self,
        num_classes: int = 10,
        sequence: str = "channel_groups",
        shape: Shape = CIFAR_SHAPE,
    ) -> None:
        super().__init__()
        check_name("sequence", sequence, SEQUENCES)
        self.sequence = sequence
        self.steps = positions(shape)
        self.cnn = nn.Sequential(*convolutions(shape[0]))
        self.lstm = nn.LSTM(input_size=128, hidden_size=64, num_layers=3, batch_first=True)
        self.fc = nn.Linear(64, num_classes)

    def extra_repr(self) -> str:
        """Show the reading of the feature map when the model is printed."""
        return f"sequence={self.sequence!r}"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        features = self.cnn(images)
        if self.sequence == "channel_groups":
            steps = features.reshape(len(features), self.steps, 128)
        else:
            steps = features.flatten(2).transpose(1, 2)
        outputs, _ = self.lstm(steps)
        return self.fc(outputs[:, -1])


@dataclass(frozen=True)
class Architecture:
    """A network that can be asked for by name.

    Args:
        about: What help and tables say of it.
        make: Builds one for a number of classes and the (C, H, W) of an image.
    """

    about: str
    make: Callable[[int, Shape], nn.Module]


ARCHITECTURES = {
    "cnn": Architecture(
        "the paper's CNN",  # its 64 outputs, while they are enough
        lambda classes, shape: CNN(max(64, classes), shape),
    ),
    "cnn-lstm": Architecture(
        "the paper's hybrid; a time step is a group of channels",
        lambda classes, shape: CNNLSTM(classes, "channel_groups", shape),
    ),
    "cnn-lstm-positions": Architecture(
        "the same hybrid; a time step is a position",
        lambda classes, shape: CNNLSTM(classes, "positions", shape),
    ),
}


def build(arch: str, seed: int = 0, shape: Shape = CIFAR_SHAPE, classes: int = 10) -> nn.Module:
    """Return a new model of architecture `arch`, initialised by `seed` alone.

    The caller's random state is left as it was.

    Args:
        arch: One of `ARCHITECTURES`.
        seed: Of the weights.
        shape: (C, H, W) of an image.
        classes: How many classes it tells apart, at least 2.

    Raises:
        ValueError: if there is no such architecture, or a number is out of range.
    """
    check_name("architecture", arch, ARCHITECTURES)
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier needs at least 2")
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`: it seeds GPUs as well
        torch.set_default_dtype(torch.float32)  # the same weights, whatever the caller has chosen
        try:
            return ARCHITECTURES[arch].make(classes, shape)
        finally:
            torch.set_default_dtype(before)


def fastest_layout(model: Callable[[Tensor], Tensor]) -> torch.memory_format:
    """Return the layout of the images in which `model` is fastest, its own `memory_format`.

    Models that do not say get the usual one: ``x.view(len(x), -1)`` fails on any other.
    """
    return getattr(model, "memory_format", torch.contiguous_format)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers in `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
