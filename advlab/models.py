"""The paper's two architectures (paper, section 6; sizes and names from its published weights).

Images are float tensors (N, 3, 32, 32) in [0, 1]; there is no normalisation layer, because each
convolution is followed by ReLU and *then* batch normalisation, which rescales for the next one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

# (input channels, output channels, stride) of the six 3x3 convolutions that both models share.
CONVOLUTIONS = ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 64, 1), (64, 128, 2))
SEQUENCES = ("channel_groups", "positions")


def convolutions() -> list[nn.Module]:
    """Return the shared stack: six times convolution, ReLU, batch norm; ends at (128, 4, 4)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in CONVOLUTIONS:
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(outputs),
        ]
    return layers


class CNN(nn.Module):
    """The paper's CNN (section 6.2): 308,256 parameters with its 64 outputs.

    Its `memory_format` tells in which layout of the images it is fastest.

    Args:
        num_outputs: Width of the last layer. The paper's 64 "neurons" are the logits themselves:
            ten of them have a label, 54 never do. With 10 outputs the model has 197,610 parameters.
    """

    memory_format = torch.channels_last

    def __init__(self, num_outputs: int = 64) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *convolutions(), nn.Flatten(), nn.Linear(128 * 4 * 4, num_outputs)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) in [0, 1] to logits (N, num_outputs)."""
        return self.network(images)


class CNNLSTM(nn.Module):
    """The paper's CNN-LSTM hybrid (section 6.3): 293,994 parameters.

    Its `memory_format` tells in which layout of the images it is fastest.

    Args:
        num_classes: Width of the last layer.
        sequence: How the (128, 4, 4) feature map becomes 16 time steps of 128 numbers.
            ``"channel_groups"`` is the paper's ``reshape(N, 16, 128)``: a step holds 8 channels at
            all 16 positions. ``"positions"`` makes a step one position with all 128 channels.

    Raises:
        ValueError: if `sequence` is neither.
    """

    memory_format = torch.channels_last

    def __init__(self, num_classes: int = 10, sequence: str = "channel_groups") -> None:
        super().__init__()
        if sequence not in SEQUENCES:
            raise ValueError(f"sequence is {sequence!r}; choose one of {', '.join(SEQUENCES)}")
        self.sequence = sequence
        self.cnn = nn.Sequential(*convolutions())
        self.lstm = nn.LSTM(input_size=128, hidden_size=64, num_layers=3, batch_first=True)
        self.fc = nn.Linear(64, num_classes)

    def extra_repr(self) -> str:
        """Show the reading of the feature map when the model is printed."""
        return f"sequence={self.sequence!r}"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) in [0, 1] to logits (N, num_classes)."""
        features = self.cnn(images)
        if self.sequence == "channel_groups":
            steps = features.reshape(len(features), 16, 128)
        else:
            steps = features.flatten(2).transpose(1, 2)
        outputs, _ = self.lstm(steps)
        return self.fc(outputs[:, -1])


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "cnn": CNN,
    "cnn-lstm": CNNLSTM,
    "cnn-lstm-positions": partial(CNNLSTM, sequence="positions"),
}


def build(arch: str, seed: int = 0) -> nn.Module:
    """Return a new model of architecture `arch`, initialised by `seed` alone.

    The caller's random state is left as it was.

    Raises:
        ValueError: if `arch` is not one of `ARCHITECTURES`.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[arch]()


def fastest_layout(model: Callable[[Tensor], Tensor]) -> torch.memory_format:
    """Return the memory format in which to give images to `model`.

    Models that do not say get the usual one: ``x.view(len(x), -1)`` fails on any other.
    """
    return getattr(model, "memory_format", torch.contiguous_format)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable numbers in `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
