"""FGSM as a transform of torchvision's: on samples and batches, in its chains and data sets."""

import math

import pytest
import torch
from conftest import OTHER_KINDS, make_batch, make_small_cnn, share_of_moved_pixels
from torchvision.datasets import wrap_dataset_for_transforms_v2

from advlab._torchvision import datasets, tv_tensors, v2
from advlab.attacks import fgsm
from advlab.transforms import FGSMTransform, Pictures

SHARE = 1e-4  # of pixels that rounding may turn where batches are cut differently


@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), *OTHER_KINDS])
@pytest.mark.parametrize("per_image", [False, True])
def test_transform_attacks_a_sample_a_batch_or_a_pair(shape, classes, per_image):
    model, batch = make_small_cnn(0, shape, classes), make_batch(12, classes, shape=shape)
    expected = fgsm(model, *batch, 0.1, per_image_statistics=per_image)
    transform = FGSMTransform(model, 0.1, per_image_statistics=per_image)
    for attacked, labels in (transform(*batch), transform(batch)):
        assert torch.equal(attacked, expected)
        assert labels is batch[1]
    image, label = transform(batch[0][3], int(batch[1][3]))
    assert image.shape == shape
    assert share_of_moved_pixels(image, expected[3]) <= SHARE
    assert label == int(batch[1][3])
    assert type(label) is int


def test_transform_keeps_image_type(small_cnn, batch):
    images, labels = batch
    transform = FGSMTransform(small_cnn, 0.1)
    image, _ = transform(tv_tensors.Image(images[0]), int(labels[0]))
    assert isinstance(image, tv_tensors.Image)
    plain, _ = transform(images[0], int(labels[0]))
    assert type(plain) is torch.Tensor
    assert torch.equal(image.as_subclass(torch.Tensor), plain)


def test_transform_works_in_a_data_loader_of_a_torchvision_data_set(small_cnn, fake_cifar10):
    plain = datasets.CIFAR10(fake_cifar10, transform=v2.PILToTensor())
    joint = datasets.CIFAR10(fake_cifar10)
    joint.transforms = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), FGSMTransform(small_cnn, 0.05)]
    )
    loader = torch.utils.data.DataLoader(wrap_dataset_for_transforms_v2(joint), batch_size=8)
    attacked, labels = next(iter(loader))
    images, wanted = zip(*(plain[i] for i in range(8)), strict=True)
    assert labels.tolist() == list(wanted)
    expected = fgsm(small_cnn, torch.stack(images) / 255, labels, 0.05)
    assert share_of_moved_pixels(attacked, expected) <= SHARE


def test_transform_attacks_each_image_with_probability_p(small_cnn):
    images, labels = make_batch(400)
    torch.manual_seed(0)
    assert torch.equal(FGSMTransform(small_cnn, 0.1, p=0)(images, labels)[0], images)
    attacked, _ = FGSMTransform(small_cnn, 0.1, p=0.3)(images, labels)
    moved = (attacked != images).flatten(1).any(1)
    deviation = math.sqrt(400 * 0.3 * 0.7)
    assert abs(int(moved.sum()) - 120) < 4 * deviation
    expected = fgsm(small_cnn, images[moved], labels[moved], 0.1)
    assert share_of_moved_pixels(attacked[moved], expected) <= SHARE


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_transform_refuses_numbers_out_of_range(small_cnn, value):
    with pytest.raises(ValueError, match=f"p is {value}; it is a probability"):
        FGSMTransform(small_cnn, 0.1, p=value)
    with pytest.raises(ValueError, match=f"eps is {value}; it must be a number from 0 to 1"):
        FGSMTransform(small_cnn, value)


def test_transform_refuses_pil_and_uint8_with_the_mend(small_cnn, shapes):
    transform = FGSMTransform(small_cnn, 0.1)
    image = shapes.train.images[0]
    with pytest.raises(TypeError, match=r"got Image; put v2.ToImage\(\) and v2.ToDtype"):
        transform(v2.functional.to_pil_image(image), 0)
    with pytest.raises(TypeError, match=r"torch.uint8; give a float tensor in \[0, 1\]"):
        transform(image, 0)


def test_transform_does_not_own_the_model(small_cnn):
    transform = FGSMTransform(small_cnn, 0.1)
    transform.train()
    assert not small_cnn.training
    assert list(transform.parameters()) == []
    assert "eps=0.1, p=1.0, per_image_statistics=False" in repr(transform)


def test_transform_without_label_says_so(small_cnn, batch):
    with pytest.raises((TypeError, ValueError), match="label"):
        FGSMTransform(small_cnn, 0.1)(batch[0][0])


def test_pictures_are_those_of_the_split(shapes):
    pictures = Pictures(shapes.train)
    assert len(pictures) == len(shapes.train)
    picture, label = pictures[5]
    assert (picture.size, picture.mode, label) == ((32, 32), "RGB", int(shapes.train.labels[5]))
    assert torch.equal(v2.functional.pil_to_tensor(picture), shapes.train.images[5])
