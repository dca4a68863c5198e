"""What the machine could do at best: the models' convolutions alone, and the work of a model."""

from copy import deepcopy
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from advlab.bench.measure import Way, side_by_side
from advlab.machine import has_fast_bf16
from advlab.models import CIFAR_SHAPE, Shape, convolutions

PRECISIONS = ("float32", "bfloat16") if has_fast_bf16(torch.device("cpu")) else ("float32",)
ROUNDS = 5


def multiply_adds(model: nn.Module, shape: Shape = CIFAR_SHAPE) -> int:
    """Count the multiply-adds of one image's forward pass, with torch's own counter.

    Args:
        model: Any; it is left as it was.
        shape: Of one image: channels, height, width.

    Raises:
        ValueError: if a layer has weights and the counter found no multiply-adds in it.
    """
    # On "meta" nothing is computed, and an LSTM is made of operators that the counter knows.
    model = deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, *shape, device="meta"))
    counted = counter.get_flop_counts()
    for name, layer in model.named_modules(prefix=type(model).__name__):
        # The vectors of a batch norm scale and shift: nothing to speak of.
        weights = any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
        if weights and not isinstance(layer, nn.LayerNorm) and not counted.get(name):
            raise ValueError(
                f"the multiply-adds of {name} ({type(layer).__name__}) cannot be counted; tell "
                "torch how, with torch.utils.flop_counter.register_flop_formula"
            )
    return counter.get_total_flops() // 2


@cache
def convolution_seconds(batch: int, precision: str) -> dict[str, float]:
    """Measure the six 3x3 convolutions of both models, and nothing else (channels_last).

    Args:
        batch: Images at a time.
        precision: "float32" or "bfloat16".

    Returns:
        Seconds per image for "predict" (forward), "train" (with the gradients of weights and inner
        inputs) and "craft" (with the gradients of all inputs).
    """
    seconds = dict.fromkeys(("predict", "train", "craft"), 0.0)
    options = {"dtype": getattr(torch, precision), "memory_format": torch.channels_last}
    x = torch.randn(batch, *CIFAR_SHAPE).to(**options)
    layers = [layer for layer in convolutions() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        weight = layer.weight.detach().to(**options)
        forward = partial(F.conv2d, x, weight, stride=layer.stride, padding=layer.padding)
        made = forward()
        # Not torch.nn.grad.conv2d_input, which is ten times as slow in bfloat16.
        backward = partial(
            torch.ops.aten.convolution_backward, made, x, weight, None, layer.stride,
            layer.padding, layer.dilation, False, [0, 0], 1,
        )  # fmt: skip
        # Training passes no gradient to the images. Both gradients of a layer are asked for at
        # once, as autograd does: what one of them prepares, the other need not.
        calls = {
            "forward": forward,
            "to input": partial(backward, [True, False, False]),
            "in training": partial(backward, [layer is not layers[0], True, False]),
        }
        ways = {name: Way(call, times=max(1, 512 // batch)) for name, call in calls.items()}
        took = side_by_side(ways, ROUNDS).values()
        one_way, to_input, in_training = (min(times) / batch for times in took)  # at best
        seconds["predict"] += one_way
        seconds["craft"] += one_way + to_input
        seconds["train"] += one_way + in_training
        x = torch.randn_like(made)
    return seconds


def highest_rate(
    model: nn.Module,
    shape: Shape,
    passes: str,
    batch: int = 64,
    precision: str = "float32",
) -> float:
    """Return images per second of `model` if all its multiply-adds ran like the convolutions.

    Args:
        model: Its other layers count by their multiply-adds.
        shape: (C, H, W) of an image.
        passes: "predict", "train" or "craft", as in `convolution_seconds`.
        batch: Images at a time.
        precision: "float32" or "bfloat16".
    """
    share = multiply_adds(nn.Sequential(*convolutions())) / multiply_adds(model, shape)
    return share / convolution_seconds(batch, precision)[passes]
