"""Where a model is called: its answers, its modes and devices, what is no classifier."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_KINDS, assert_same_state, make_batch, make_small_cnn
from torch import nn

from advlab.forward import eval_mode, evaluate, holds, per_image_statistics_mode, predict


@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), *OTHER_KINDS])
def test_answers_are_counted_whatever_the_images(shape, classes):
    model = make_small_cnn(0, shape, classes)
    images, labels = make_batch(130, classes, shape=shape)  # more than one chunk of 100
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(predict(model, images), logits)
    right = logits.argmax(1) == labels
    correct, loss = evaluate(model, images, labels)
    assert correct == int(right.sum())
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert torch.equal(holds(model, images, labels), right)
    assert holds(model, images, logits.argmax(1)).all()


def test_model_is_asked_in_float32_and_eval_mode_and_left_as_it_was(small_cnn, batch):
    expected = predict(small_cnn, batch[0])
    model = nn.Sequential(small_cnn, nn.Dropout(0.9)).train()
    small_cnn[2].eval()  # a batch norm frozen by its owner
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(model, batch[0].requires_grad_())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert_same_state(model, state)


@pytest.mark.parametrize("mode", [eval_mode, per_image_statistics_mode])
def test_modes_end_with_their_block_even_if_it_fails(mode, small_cnn):
    small_cnn.train()
    with pytest.raises(RuntimeError, match="on purpose"), mode(small_cnn):
        raise RuntimeError("on purpose")
    assert all(module.training for module in small_cnn.modules())
    assert not any(module._forward_hooks for module in small_cnn.modules())
