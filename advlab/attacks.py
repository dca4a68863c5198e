"""The fast gradient sign method (FGSM), its torchvision transform, and its iteration (PGD).

FGSM (Goodfellow et al. 2015, arXiv 1412.6572; paper, section 1.1) moves every pixel by `eps` in the
direction that raises the loss: ``clamp(x + eps * sign(gradient), 0, 1)``. The direction does not
depend on `eps`, so `fgsm_direction` computes it once and `perturb` applies it for any `eps`.

All gradients are taken in float32 and in eval mode, with respect to the images alone. The model is
left as it was found: each module's own mode, its buffers and its parameters' ``.grad``.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab._torchvision import tv_tensors, v2
from advlab.data import check_batch
from advlab.models import fastest_layout

Classifier = Callable[[Tensor], Tensor]

# Images per gradient. Small chunks stay in the processor's cache: on two cores, 100 at a time is
# about 1.7 times as fast as 1,000 at a time.
CHUNK = 100


def check_eps(eps: float, name: str = "eps") -> float:
    """Return `eps` as a float.

    Args:
        eps: A size in units of the pixel range.
        name: What the error calls it.

    Raises:
        ValueError: if `eps` is not a number from 0 to 1.
    """
    value = float(eps)
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} is {eps}; it must be a number from 0 to 1, in units of the pixel range [0, 1] "
            "(8 steps of an 8-bit image are 8/255)"
        )
    return value


@contextmanager
def eval_mode(model: Classifier) -> Iterator[None]:
    """Put every module of `model` in eval mode; give each its own mode back at the end.

    `model.train()` afterwards would be wrong: a layer that its owner keeps in eval mode (frozen
    batch norm, say) would be switched as well. A model that is no `nn.Module` is left alone.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _normalise_per_image(module: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    # One group per channel is instance normalisation. `F.instance_norm` itself is not used: for a
    # single image in channels_last memory format it gives wrong gradients (torch 2.13).
    (x,) = inputs
    return F.group_norm(x, x.shape[1], module.weight, module.bias, module.eps)


@contextmanager
def per_image_statistics_mode(model: Classifier) -> Iterator[None]:
    """Let each batch-norm layer normalise every image by that image's own mean and variance.

    It is what training mode does to a batch of one image, and how the paper's attack computed its
    gradients, here for a whole batch at once and without touching the running statistics.

    Raises:
        ValueError: if `model` has no `nn.BatchNorm2d` layer.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    layers = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        raise ValueError(
            f"per_image_statistics=True needs a model with BatchNorm2d layers; "
            f"{type(model).__name__} has none. Leave it False"
        )
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(_normalise_per_image).remove)
        yield


def check_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `logits` if they are (N, classes) and have a column for each label.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model returned {shape} for {len(labels)} images; it must return logits of shape "
            f"({len(labels)}, classes)"
        )
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"label {int(labels.max())} has no logit: the model returned {logits.shape[1]} of them"
        )
    return logits


@contextmanager
def _crafting(model: Classifier, images: Tensor) -> Iterator[None]:
    """Let gradients be taken in float32 and eval mode, whatever the caller has switched off."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        eval_mode(model),
    ):
        yield


def _gradients(
    model: Classifier, images: Tensor, labels: Tensor, per_image_statistics: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `CHUNK` images at a time with their input gradients (see `input_gradient`)."""
    check_batch(images, labels)
    # Reordering costs a single image more than it gains.
    layout = fastest_layout(model) if len(images) > 1 else torch.contiguous_format
    with _crafting(model, images), ExitStack() as stack:
        if per_image_statistics:
            stack.enter_context(per_image_statistics_mode(model))
            layout = torch.contiguous_format  # group_norm is slow in the other
        parts = zip(images.detach().split(CHUNK), labels.split(CHUNK), strict=True)
        for part, targets in parts:
            x = part.float().clone(memory_format=layout).requires_grad_()
            # A clone, outside inference mode: autograd refuses the tensors of that mode.
            targets = targets.clone()
            logits = check_logits(model(x), targets).float()
            # The sum, not the mean: each image's gradient is then its own, whatever the batch.
            loss = F.cross_entropy(logits, targets, reduction="sum")
            yield part, torch.autograd.grad(loss, x)[0].contiguous()


def input_gradient(
    model: Classifier, images: Tensor, labels: Tensor, *, per_image_statistics: bool = False
) -> Tensor:
    """Return the gradient of each image's cross entropy with respect to that image.

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64.
        per_image_statistics: Normalise by each image's own statistics (see
            `per_image_statistics_mode`), as the paper's attack did, not by the running ones.

    Returns:
        (N, 3, 32, 32) float32.

    Raises:
        ValueError: if images, labels or logits are not as above.
        TypeError: if images or labels have the wrong dtype.
    """
    chunks = _gradients(model, images, labels, per_image_statistics)
    return torch.cat([gradient for _, gradient in chunks])


def fgsm_direction(
    model: Classifier, images: Tensor, labels: Tensor, *, per_image_statistics: bool = False
) -> Tensor:
    """Return the sign of the loss gradient, the direction in which FGSM moves each pixel.

    Args, errors: as `input_gradient`.

    Returns:
        (N, 3, 32, 32) int8 with values -1, 0 and 1; the same for every `eps`.
    """
    # Signs at once, chunk by chunk: the gradients of 50,000 images would fill 600 MB.
    chunks = _gradients(model, images, labels, per_image_statistics)
    return torch.cat([gradient.sign().to(torch.int8) for _, gradient in chunks])


def perturb(images: Tensor, direction: Tensor, eps: float) -> Tensor:
    """Return ``clamp(images + eps * direction, 0, 1)``.

    Args:
        images: (N, 3, 32, 32) float in [0, 1].
        direction: The same shape, signs.
        eps: Size of the step, from 0 to 1, in units of the pixel range.

    Raises:
        ValueError: if `eps` is out of range or the shapes differ.
    """
    if images.shape != direction.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and direction {tuple(direction.shape)} must have the "
            "same shape: a direction belongs to the images it was made from"
        )
    return torch.add(images, direction, alpha=check_eps(eps)).clamp_(0, 1)


def fgsm(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    per_image_statistics: bool = False,
) -> Tensor:
    """Attack `images` with one step of size `eps` (paper, section 1.1).

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Size of the step, from 0 to 1, in units of the pixel range.
        per_image_statistics: As in `input_gradient`.

    Returns:
        Attacked images, the same shape and dtype, in [0, 1] and at most `eps` from `images`.

    Raises:
        ValueError: if `eps` or a value is out of range, or a shape is wrong.
        TypeError: if a dtype is wrong.
    """
    check_eps(eps)
    # Not by way of `fgsm_direction`: for a single image its detour through int8 can be measured.
    chunks = _gradients(model, images, labels, per_image_statistics)
    return torch.cat([perturb(x, g.sign().to(x.dtype), eps) for x, g in chunks])


def _start(images: Tensor, eps: float, random_start: bool, seed: int) -> Tensor:
    """Return where PGD begins: the images, or a uniformly random point of each one's eps-ball."""
    if not random_start:
        return images.clone()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator).mul_(2).sub_(1).to(images.device)
    return noise.mul_(eps).add_(images).clamp_(0, 1)


def pgd(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    alpha: float,
    steps: int,
    random_start: bool = True,
    seed: int = 0,
) -> Tensor:
    """Attack `images` with many small steps that stay within `eps` (Madry et al. 2018, 1706.06083).

    Projected gradient descent: ``x <- clamp(x + alpha * sign(gradient))``, clamped to within `eps`
    of the image and to [0, 1]. An image leaves the batch as soon as the model gets it wrong, so
    weak models are attacked in a fraction of the time; the others keep the point of highest loss.

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Largest change of a pixel, from 0 to 1, in units of the pixel range.
        alpha: Size of a step, the same units.
        steps: How many steps.
        random_start: Begin at a random point within `eps` of each image, not at the image.
        seed: Of the random start.

    Returns:
        Attacked images, the same shape and dtype, in [0, 1] and at most `eps` from `images`.

    Raises:
        ValueError: if `eps`, `alpha`, `steps` or a value is out of range, or a shape is wrong.
        TypeError: if a dtype is wrong.
    """
    check_eps(eps)
    check_eps(alpha, "alpha")
    if steps < 1:
        raise ValueError(f"steps is {steps}; PGD needs at least 1")
    check_batch(images, labels)
    layout = fastest_layout(model)
    with _crafting(model, images):
        originals, targets = images.detach().float().clone(), labels.clone()
        x = _start(originals, eps, random_start, seed)
        worst, highest = x.clone(), torch.full_like(targets, -math.inf, dtype=torch.float32)
        active = torch.arange(len(images), device=images.device)
        for step in range(steps + 1):
            holding = []
            # All images take a step before any takes the next: the chunks stay full to the end.
            for part in active.split(CHUNK):
                now = x[part].contiguous(memory_format=layout).requires_grad_(step < steps)
                logits = check_logits(model(now), targets[part]).float()
                losses = F.cross_entropy(logits, targets[part], reduction="none")
                broken = logits.argmax(1) != targets[part]
                worse = broken | (losses.detach() > highest[part])
                worst[part[worse]] = now.detach()[worse]
                highest[part[worse]] = losses.detach()[worse]
                holding.append(part[~broken])
                if step < steps:
                    gradient = torch.autograd.grad(losses.sum(), now)[0]
                    moved = now.detach().add(gradient.sign(), alpha=alpha)
                    near = originals[part]
                    x[part] = moved.clamp_(near - eps, near + eps).clamp_(0, 1)
            active = torch.cat(holding)
            if len(active) == 0:
                break
        return worst.to(images.dtype)


class FGSMTransform(v2.Transform):
    """FGSM as a torchvision transform of image and label together (paper, section 6.1).

    Works in `v2.Compose` and as the joint ``transforms`` of a torchvision data set, on one sample
    (image (3, 32, 32), label an int) or on a batch (images (N, 3, 32, 32), labels (N,)). Images
    must be float in [0, 1], so put ``v2.ToImage()`` and ``v2.ToDtype(torch.float32, scale=True)``
    before it, and every flip or crop too: the direction belongs to the pixels it was made from.

    Args:
        model: The model whose gradient is used.
        eps: Size of the step, from 0 to 1.
        p: Probability with which an image is attacked; each image of a batch has its own draw.
        per_image_statistics: As in `fgsm`; the paper's transform is ``True``.

    Raises:
        ValueError: if `eps` or `p` is not between 0 and 1.
    """

    def __init__(
        self, model: Classifier, eps: float, p: float = 1.0, per_image_statistics: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; it is a probability, from 0 to 1")
        self.eps = check_eps(eps)
        self.p = p
        self.per_image_statistics = per_image_statistics
        # In a list, so that the attacked model is not registered as a part of this module: moving
        # or switching the transform must not move or switch the model.
        self._source = [model]

    def forward(self, *inputs: object) -> tuple[Tensor, object]:
        """Return (attacked image, label) for ``transform(image, label)`` or one pair of them."""
        pair = inputs[0] if len(inputs) == 1 else inputs
        if isinstance(pair, Tensor) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                "FGSMTransform needs the label too: call it with (image, label). In a torchvision "
                "data set it belongs in `transforms`, the joint ones, not in `transform`"
            )
        image, label = pair
        if not isinstance(image, Tensor):
            raise TypeError(
                f"FGSMTransform got {type(image).__name__}; put v2.ToImage() and "
                "v2.ToDtype(torch.float32, scale=True) before it"
            )
        single = image.ndim == 3
        images = image.as_subclass(Tensor).unsqueeze(0) if single else image.as_subclass(Tensor)
        labels = torch.as_tensor(label, device=images.device).reshape(-1)
        check_batch(images, labels)
        chosen = torch.rand(len(images)) < self.p
        attacked = images.clone()
        if chosen.any():
            attacked[chosen] = fgsm(
                self._source[0],
                images[chosen],
                labels[chosen],
                self.eps,
                per_image_statistics=self.per_image_statistics,
            )
        result = attacked[0] if single else attacked
        return (
            tv_tensors.wrap(result, like=image) if isinstance(image, tv_tensors.Image) else result,
            label,
        )

    def extra_repr(self) -> str:
        """Show the settings when the transform is printed."""
        return f"eps={self.eps}, p={self.p}, per_image_statistics={self.per_image_statistics}"
