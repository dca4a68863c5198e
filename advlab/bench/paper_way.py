"""The paper's way of doing it, plainly: the reference that `advlab bench` measures against.

A torchvision data set turns one picture at a time into a tensor, a `DataLoader` collects them, the
attack is crafted image by image in training mode, again for every eps and every epoch, and all of
it runs in float32 (paper, sections 3 and 6; findings.md, 1 and 2). The tests hold the fast code to
the same results.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from advlab._torchvision import ToTensor, datasets
from advlab.data import Split


class Pictures(datasets.CIFAR10):
    """A split as torchvision's own CIFAR-10 data set: a PIL picture, made a tensor on access.

    Args:
        split: Any images, so that other data go the same way.
    """

    def __init__(self, split: Split) -> None:
        pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.data = pixels[..., 0] if pixels.shape[3] == 1 else pixels  # grey, as PIL has it
        self.targets = split.labels.tolist()
        self.transform, self.target_transform = ToTensor(), None


def shuffled(split: Split) -> DataLoader:
    """Return the paper's batches of `split`: 64 pictures, in random order."""
    return DataLoader(Pictures(split), batch_size=64, shuffle=True)


def fgsm_one(model: nn.Module, image: Tensor, label: int, eps: float) -> Tensor:
    """Attack one image (C, H, W): the model in training mode, on a batch of one.

    The forward pass changes the running statistics of `model`, as it did in the paper.
    """
    model.train()
    x = image[None].clone().requires_grad_()
    F.cross_entropy(model(x), torch.tensor([label])).backward()
    assert x.grad is not None
    return (image + eps * x.grad[0].sign()).clamp(0, 1)


class Attacked(Dataset):
    """Attack every image of `pictures` when it is asked for, each time anew.

    Args:
        pictures: Gives (image, label).
        model: The model whose gradient is used.
        eps: Size of the step.
    """

    def __init__(self, pictures: Any, model: nn.Module, eps: float) -> None:
        self.pictures, self.model, self.eps = pictures, model, eps

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pictures[index]
        return fgsm_one(self.model, image, label, self.eps), label


def train_steps(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], lr: float) -> None:
    """Train `model` on `batches` with Adam in float32, one step each."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for images, labels in batches:
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()


def count_correct(model: nn.Module, dataset: Dataset) -> int:
    """Return how many images of `dataset` the model gets right, in eval mode."""
    correct = 0
    for images, labels in DataLoader(dataset, batch_size=64):
        model.eval()  # each time: a data set that attacks with this model leaves it training
        with torch.no_grad():
            correct += int((model(images).argmax(1) == labels).sum())
    return correct
