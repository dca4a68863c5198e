"""The one place where a model is called: its mode, its answers, and what is counted of them.

Everything is computed in eval mode, in parts of at most `CHUNK` images, and in the dtype of the
model's weights, which is float32 here. On a CPU several threads take the parts (see `sharing`). The
model is left as it was found, and so are the images.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

from advlab.data import check_batch, check_images
from advlab.machine import in_threads, threads, torch_threads
from advlab.models import fastest_layout

Classifier = Callable[[Tensor], Tensor]
T = TypeVar("T")

# Images per call. Small chunks stay in the processor's cache: on two cores, 100 at a time is about
# 1.7 times as fast as 1,000 at a time.
CHUNK = 100
# Where threads share them, a chunk is halved if it has so many: one thread is no slower with two
# halves of 4 images than with 8, two threads are up to twice as fast (measured on two cores).
HALVED = 8
PIXELS = 32 * 32  # of an image, for these numbers; larger ones count for several

# Modules whose `forward` only reads what it is given, once they are in eval mode: several threads
# may call them at once. Nobody knows that of others: they may keep something between two lines.
PURE = (
    "torch.nn.modules.",
    "torch.nn.utils.parametri",  # parametrize and parametrizations
    "torchvision.models.",
    "advlab.models",
)
DRAWING = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)  # random numbers, in eval mode, too
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def modules_of(model: Classifier) -> list[nn.Module]:
    """Return each module of `model` once; none of a function.

    `model.modules()` makes up their names as well, which a single image notices.
    """
    found: dict[nn.Module, None] = {}
    left = [model] if isinstance(model, nn.Module) else []
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left += [child for child in module._modules.values() if child is not None]
    return list(found)


def _is_pure(module: nn.Module) -> bool:
    own = vars(module)
    return (
        type(module).__module__.startswith(PURE)
        and not isinstance(module, DRAWING)
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and module._compiled_call_impl is None
    )


def _is_watched() -> bool:
    """Tell whether torch reports each operator of this thread to somebody, or each module."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or any(getattr(hooks, f"_global{name}") for name in HOOKS)
    )


@contextmanager
def sharing(model: Classifier, images: Tensor) -> Iterator[Callable[..., list[Any]]]:
    """Yield the function by which everything that is asked of `model` is cut into parts.

    ``share(work, *tensors)`` calls ``work`` with each part of the tensors, which are equally long,
    and returns what it gave in order. Threads share the parts where the model is of modules that
    are known to allow it (`PURE`), on a CPU, without hooks and watchers. Everybody else's model is
    called part after part: it may draw random numbers, count its calls or keep what it saw.

    Parts depend on the number of images alone, and each is computed by one torch thread, so the
    results are the same to the last bit for any number of threads. What is computed between two
    calls of ``share`` has one torch thread, too: torch's others would wait for more work for some
    milliseconds, on the cores on which the parts are to be computed.

    Args:
        model: In any mode; before hooks of ours are set.
        images: (N, C, H, W), on its device.
    """
    modules = modules_of(model) if images.device.type == "cpu" else ()
    if modules and all(map(_is_pure, modules)) and not _is_watched():
        size = images.shape[2] * images.shape[3] / PIXELS
        allowed = threads() if len(images) * size > 1 else 1  # which takes a while to find out
        with torch_threads(1):
            yield partial(_share, size, allowed)
    else:
        yield _one_by_one


def _one_by_one(work: Callable[..., T], *tensors: Tensor) -> list[T]:
    return [work(*part) for part in zip(*(t.split(CHUNK) for t in tensors), strict=True)]


def _share(size: float, allowed: int, work: Callable[..., T], *tensors: Tensor) -> list[T]:
    """Share parts of images that have `size` times 32 x 32 pixels (see `sharing`)."""
    if len(tensors[0]) == 1 < size:  # a single large image: torch's own threads are all that helps
        with torch_threads(allowed):
            return [work(*tensors)]
    parts: list[tuple[Tensor, ...]] = []
    for chunk in zip(*(t.split(max(1, int(CHUNK / max(1, size)))) for t in tensors), strict=True):
        pieces = 2 if len(chunk[0]) * size >= HALVED else 1
        parts += zip(*(t.tensor_split(pieces) for t in chunk), strict=True)
    return in_threads(work, parts, allowed)


@contextmanager
def eval_mode(model: Classifier) -> Iterator[None]:
    """Put every module of `model` in eval mode; give each its own mode back at the end.

    `model.train()` afterwards would be wrong: a layer that its owner keeps in eval mode (frozen
    batch norm, say) would be switched as well. What a function calls, no `nn.Module`, cannot be
    found: `ask` refuses one that calls a model in training mode.
    """
    training = [module for module in modules_of(model) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _refuse_training(module: nn.Module, _: object) -> None:
    # Dropout and batch statistics would count, and change.
    has_state = next(chain(module.parameters(), module.buffers()), None) is not None
    if module.training and (has_state or isinstance(module, _DropoutNd)):
        raise ValueError(
            f"the function calls a model ({type(module).__name__}) that is in training mode; call "
            "its eval() first, or give the model itself"
        )


@contextmanager
def float32_mode(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: without autocast, and on CUDA without TF32 in cuDNN's layers.

    TF32 has 10 bits where float32 has 23. Convolutions there use it unless told otherwise; matrix
    products only if the caller says so.
    """
    cudnn: Any = torch.backends.cudnn
    layers = (cudnn.conv, cudnn.rnn) if device.type == "cuda" else ()
    before = [layer.fp32_precision for layer in layers]
    try:
        for layer in layers:
            layer.fp32_precision = "ieee"
        # Entered where it changes something alone, as the modes below: a single image notices.
        autocast = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        for layer, precision in zip(layers, before, strict=True):
            layer.fp32_precision = precision


@contextmanager
def recurrent_gradients(model: Classifier, device: torch.device) -> Iterator[None]:
    """Let gradients of recurrent layers be taken in eval mode.

    cuDNN's refuse them, PyTorch's own allow them; other models keep cuDNN, which is faster.
    """
    # Not `cudnn.flags`: it also sets, and may refuse to read, what the caller chose for TF32.
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.enabled
    may_recur = not isinstance(model, nn.Module) or any(  # a function could hide such layers
        isinstance(module, nn.RNNBase) for module in modules_of(model)
    )
    try:
        if may_recur:
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def gradient_mode(model: Classifier, device: torch.device) -> Iterator[None]:
    """Let gradients be taken in float32 and eval mode, whatever the caller has switched off."""
    inference = torch.is_inference_mode_enabled()
    with (
        torch.inference_mode(False) if inference else nullcontext(),
        nullcontext() if torch.is_grad_enabled() else torch.enable_grad(),
        float32_mode(device),
        recurrent_gradients(model, device),
        eval_mode(model),
    ):
        yield


def _normalise_per_image(module: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    # One group per channel is instance normalisation. `F.instance_norm` itself is not used: for a
    # single image in channels_last memory format it gives wrong gradients (torch 2.13).
    (x,) = inputs
    if x[0, 0].numel() == 1:
        raise ValueError(
            f"per_image_statistics=True: a BatchNorm2d layer is given {tuple(x.shape)}, and one "
            "pixel has no spread. Take larger images, or leave it False"
        )
    return F.group_norm(x, x.shape[1], module.weight, module.bias, module.eps)


@contextmanager
def per_image_statistics_mode(model: Classifier) -> Iterator[None]:
    """Let each batch-norm layer normalise every image by that image's own mean and variance.

    It is what training mode does to a batch of one image, and how the paper's attack computed its
    gradients, here for a whole batch at once and without touching the running statistics.

    Raises:
        ValueError: if `model` has no `nn.BatchNorm2d` layer.
    """
    layers = [module for module in modules_of(model) if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        raise ValueError(
            f"per_image_statistics=True needs a model with BatchNorm2d layers; "
            f"{type(model).__name__} has none. Leave it False"
        )
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(_normalise_per_image).remove)
        yield


def ask(model: Classifier, images: Tensor, layout: torch.memory_format | None = None) -> Tensor:
    """Return the logits of a batch, through which gradients flow where the caller takes them.

    The model is given a copy, in its own dtype and layout: layers that work in place (as
    ``nn.ReLU(inplace=True)`` does) would change the caller's images.

    Args:
        model: In eval mode, on the device of the images.
        images: (N, C, H, W) float.
        layout: Of the copy; None for that in which the model is fastest.

    Returns:
        (N, outputs) float32.

    Raises:
        ValueError: if the model returns anything else, NaN or infinity; or if it is a function that
            calls a model in training mode.
    """
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    dtype = next((w.dtype for w in weights if w.is_floating_point()), torch.float32)
    hook = None
    if not isinstance(model, nn.Module):
        hook = register_module_forward_pre_hook(_refuse_training)
    try:
        logits = model(images.to(dtype).clone(memory_format=layout or fastest_layout(model)))
    finally:
        if hook:
            hook.remove()
    n = len(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        is_tensor = isinstance(logits, Tensor)
        shape = tuple(logits.shape) if is_tensor else f"a {type(logits).__name__}"
        mend = "" if is_tensor else "; wrap it in a model that returns them alone"
        raise ValueError(
            f"the model returned {shape} for {n} images; it must return logits of shape "
            f"({n}, classes){mend}"
        )
    logits = logits.float()
    if not _is_finite(logits):
        broken = int((~logits.isfinite().all(1)).sum())
        raise ValueError(
            f"the model returned NaN or infinity for {broken} of {n} images that it was given at "
            "once; nothing can be measured of it. Look for weights, running variances or a "
            "division that make them"
        )
    return logits


def _is_finite(numbers: Tensor) -> bool:
    # One pass: a sum is NaN or infinite if a number is. It may overflow, too; then each is asked.
    return math.isfinite(numbers.detach().sum()) or bool(numbers.isfinite().all())


def gradient_of(loss: Tensor, images: Tensor) -> Tensor:
    """Return the gradient of `loss` with respect to `images`, of which it was computed.

    Raises:
        ValueError: if there is none, or it holds NaN or infinity.
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the model's logits carry no gradient (it detaches them, computes under no_grad, or "
            "returns no differentiable numbers); a white-box attack needs one. Without it there "
            'are "noise", transfer from another model, and AutoAttack\'s "square"'
        )
    if not _is_finite(gradient):
        broken = int((~gradient.isfinite().flatten(1).all(1)).sum())
        raise ValueError(
            f"the model's gradient is NaN or infinite for {broken} of {len(images)} images that it "
            "was given at once; an attack cannot follow it. Look for a square root, logarithm or "
            "division at 0"
        )
    return gradient


def check_outputs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `logits` (N, outputs) if they have a column for each label.

    Raises:
        ValueError: otherwise.
    """
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"label {int(labels.max())} has no logit: the model returned {logits.shape[1]} of them"
        )
    return logits


def check_device(model: Classifier, images: Tensor) -> None:
    """Check that the model's weights, if it has any, lie where the images are.

    Raises:
        ValueError: if they do not; names both devices.
    """
    if isinstance(model, nn.Module):
        weights = next(model.parameters(), None)
        if weights is not None and weights.device != images.device:
            raise ValueError(
                f"the model is on {weights.device}, the images on {images.device}; move one: "
                "model.to(...) or images.to(...)"
            )


def predict(model: Classifier, images: Tensor) -> Tensor:
    """Return the logits of images.

    Args:
        model: Maps images to logits; any callable.
        images: (N, C, H, W) float in [0, 1].

    Returns:
        (N, outputs) float32, on the device of the images.

    Raises:
        ValueError, TypeError: if the images are not as in `check_images`, the model lies elsewhere,
            or its answer is not as in `ask`.
    """
    check_images(images)
    return _predict(model, images)


@torch.no_grad()
def _predict(model: Classifier, images: Tensor) -> Tensor:
    check_device(model, images)
    with sharing(model, images) as share, eval_mode(model), float32_mode(images.device):
        return torch.cat(share(partial(ask, model), images))


def evaluate(model: Classifier, images: Tensor, labels: Tensor) -> tuple[int, float]:
    """Return (number of correct images, mean cross entropy) of `model`.

    Raises:
        ValueError, TypeError: as `predict`; if the labels are not as in `check_labels`, or have no
            logit.
    """
    logits = _answers(model, images, labels).cpu()  # not every GPU has float64
    loss = float(F.cross_entropy(logits.double(), labels.cpu()))
    return int((logits.argmax(1) == labels.cpu()).sum()), loss


def holds(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether `model` gets it right, (N,) bool.

    The worst case of several attacks is the `&` of their results: an image counts as held only if
    no attack broke it.

    Raises:
        ValueError, TypeError: as `evaluate`.
    """
    return _answers(model, images, labels).argmax(1) == labels


def _answers(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    check_batch(images, labels)
    return check_outputs(_predict(model, images), labels)
