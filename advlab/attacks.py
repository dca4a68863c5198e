"""The fast gradient sign method (FGSM), its torchvision transform, and its iterations (PGD, BIM).

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
NORMS = ("linf", "l2")
LOSSES = ("ce", "dlr", "margin")
# The L2 distance of a black image from a white one, sqrt(3 * 32 * 32).
LARGEST_L2 = math.sqrt(3 * 32 * 32)


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


def check_size(value: float, norm: str, name: str = "eps") -> float:
    """Return an eps or alpha of `norm` as a float.

    Args:
        value: A size in units of the pixel range [0, 1]; for "l2" a length over all pixels.
        norm: One of `NORMS`.
        name: What the error calls it.

    Raises:
        ValueError: if there is no such norm, or no two images are so far apart.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(NORMS)}")
    if norm == "linf":
        return check_eps(value, name)
    if not math.isfinite(value) or not 0 <= value <= LARGEST_L2:
        raise ValueError(
            f"{name} is {value}; as an L2 length of images in [0, 1] it must be a number from 0 to "
            f"{LARGEST_L2:.1f}. Usual is 0.5; lengths of 8-bit images must be divided by 255"
        )
    return float(value)


def check_targets(targeted: Tensor, labels: Tensor) -> Tensor:
    """Return the classes that a targeted attack aims at.

    Args:
        targeted: (N,) int64, none the true class.
        labels: (N,) int64, the true classes.

    Raises:
        TypeError: if `targeted` is no int64 tensor.
        ValueError: if its shape is wrong, a class is negative or is the image's own.
    """
    if not isinstance(targeted, Tensor) or targeted.dtype != torch.int64:
        kind = targeted.dtype if isinstance(targeted, Tensor) else type(targeted).__name__
        raise TypeError(f"targeted is {kind}; give an int64 tensor of the classes to aim at")
    if targeted.shape != labels.shape:
        raise ValueError(
            f"targeted has shape {tuple(targeted.shape)}; it must be {tuple(labels.shape)}, a "
            "class for each image"
        )
    if int(targeted.min()) < 0:
        raise ValueError(f"target {int(targeted.min())} is negative; classes count from 0")
    same = int((targeted == labels).sum())
    if same:
        raise ValueError(
            f"{same} of {len(labels)} targets are the image's own class; aim at another one"
        )
    return targeted


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
    targeted: Tensor | None = None,
    per_image_statistics: bool = False,
) -> Tensor:
    """Attack `images` with one step of size `eps` (paper, section 1.1).

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Size of the step, from 0 to 1, in units of the pixel range.
        targeted: (N,) int64, classes to move towards, not the true ones; None moves away from the
            true class, wherever that leads.
        per_image_statistics: As in `input_gradient`.

    Returns:
        Attacked images, the same shape and dtype, in [0, 1] and at most `eps` from `images`.

    Raises:
        ValueError: if `eps` or a value is out of range, or a shape is wrong.
        TypeError: if a dtype is wrong.
    """
    check_eps(eps)
    away = 1
    if targeted is not None:
        away, labels = -1, check_targets(targeted, labels)
    # Not by way of `fgsm_direction`: for a single image its detour through int8 can be measured.
    chunks = _gradients(model, images, labels, per_image_statistics)
    return torch.cat([perturb(x, g.sign().mul_(away).to(x.dtype), eps) for x, g in chunks])


def attack_loss(
    logits: Tensor, labels: Tensor, loss: str = "ce", targeted: Tensor | None = None
) -> Tensor:
    """Return what an attack raises, for each image.

    Args:
        logits: (N, classes); "dlr" needs at least 4 classes.
        labels: (N,) int64, the true classes.
        loss: "ce": the cross entropy. "margin": the best other logit minus the true one, above 0
            once the image is broken (Carlini and Wagner 2017, 1608.04644). "dlr": that margin
            divided by the gap from the best to the third logit, so that scaling the logits changes
            nothing (Croce and Hein 2020, 2003.01690).
        targeted: (N,) int64; the same losses, towards these classes.

    Returns:
        (N,) of the logits' dtype.

    Raises:
        ValueError: if there is no such loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(LOSSES)}")
    if loss == "ce":
        if targeted is None:
            return F.cross_entropy(logits, labels, reduction="none")
        return -F.cross_entropy(logits, targeted, reduction="none")
    if loss == "margin":
        return _margin(logits, labels) if targeted is None else -_margin(logits, targeted)
    best = logits.topk(4, dim=1).values
    if targeted is None:
        return _margin(logits, labels) / (best[:, 0] - best[:, 2] + 1e-12)
    chosen = logits.gather(1, torch.stack([targeted, labels], 1))
    gap = best[:, 0] - (best[:, 2] + best[:, 3]) / 2
    return (chosen[:, 0] - chosen[:, 1]) / (gap + 1e-12)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best logit but that of `labels`, minus the latter."""
    own = labels[:, None]
    others = logits.scatter(1, own, -math.inf)
    return others.amax(1) - logits.gather(1, own)[:, 0]


def _start(images: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Return a uniformly random point of each image's eps-ball, cut to [0, 1]."""
    if norm == "linf":
        noise = torch.rand(images.shape, generator=generator).mul_(2).sub_(1).mul_(eps)
    else:
        noise = torch.randn(images.shape, generator=generator)
        radius = torch.rand(len(images), generator=generator) ** (1 / noise[0].numel()) * eps
        noise *= (radius / noise.flatten(1).norm(dim=1))[:, None, None, None]
    return noise.to(images.device).add_(images).clamp_(0, 1)


def _step(
    x: Tensor, gradient: Tensor, originals: Tensor, eps: float, alpha: float, norm: str
) -> Tensor:
    """Go `alpha` along the gradient, then back into the eps-ball of the originals and [0, 1]."""
    if norm == "linf":
        moved = x.add(gradient.sign(), alpha=alpha)
        return moved.clamp_(originals - eps, originals + eps).clamp_(0, 1)
    moved = x + alpha * gradient / _lengths(gradient).clamp_min(1e-12)
    change = moved.sub_(originals)
    # Cutting to [0, 1] afterwards brings each pixel nearer to the original: the ball is kept.
    return (
        change.mul_((eps / _lengths(change).clamp_min(1e-12)).clamp_max(1))
        .add_(originals)
        .clamp_(0, 1)
    )


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def pgd(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    alpha: float,
    steps: int,
    random_start: bool = True,
    restarts: int = 1,
    targeted: Tensor | None = None,
    norm: str = "linf",
    loss: str = "ce",
    seed: int = 0,
) -> Tensor:
    """Attack `images` with many small steps that stay within `eps` (Madry et al. 2018, 1706.06083).

    Projected gradient descent: a step along the gradient (its sign for "linf", itself, made `alpha`
    long, for "l2"), back to within `eps` of the image and to [0, 1], and so on. An image leaves the
    batch as soon as the model gets it wrong, so weak models are attacked in a fraction of the time;
    the others keep the point of highest loss over all steps and restarts.

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Largest change, in units of the pixel range: of a pixel (from 0 to 1) for "linf", of
            the image as a whole (a length, from 0 to 55.4) for "l2".
        alpha: Size of a step, the same units, above 0.
        steps: How many steps.
        random_start: Begin at a random point within `eps` of each image, not at the image.
        restarts: How often to begin anew, with the images that still hold.
        targeted: (N,) int64, classes to reach, not the true ones; None: any wrong class will do.
        norm: "linf" or "l2".
        loss: As in `attack_loss`.
        seed: Of the random starts.

    Returns:
        Attacked images, the same shape and dtype, in [0, 1] and at most `eps` from `images`.

    Raises:
        ValueError: if a number is out of range, a shape is wrong, there is no such norm or loss, a
            target is the image's own class, or restarts would repeat the same attack.
        TypeError: if a dtype is wrong.
    """
    check_size(eps, norm)
    if not check_size(alpha, norm, "alpha") > 0:
        raise ValueError(f"alpha is {alpha}; a step must have a size above 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; PGD needs at least 1")
    if restarts < 1 or (restarts > 1 and not random_start):
        raise ValueError(
            f"restarts is {restarts} with random_start={random_start}; give at least 1, and only 1 "
            "without a random start: every restart would be the same"
        )
    check_batch(images, labels)
    goal = None if targeted is None else check_targets(targeted, labels).clone()
    layout = fastest_layout(model)
    generator = torch.Generator().manual_seed(seed)

    with _crafting(model, images):
        originals, own = images.detach().float().clone(), labels.clone()
        worst, highest = originals.clone(), torch.full_like(own, -math.inf, dtype=torch.float32)
        active = torch.arange(len(images), device=images.device)
        for _ in range(restarts):
            # For all images, so that an image's noise does not depend on which others hold.
            x = _start(originals, eps, norm, generator) if random_start else originals.clone()
            for step in range(steps + 1):
                holding = []
                # All take a step before any takes the next: the chunks stay full to the end.
                for part in active.split(CHUNK):
                    now = x[part].contiguous(memory_format=layout).requires_grad_(step < steps)
                    logits = check_logits(model(now), own[part]).float()
                    aim = None if goal is None else goal[part]
                    losses = attack_loss(logits, own[part], loss, aim)
                    found = logits.detach().argmax(1)
                    broken = found != own[part] if aim is None else found == aim
                    worse = broken | (losses.detach() > highest[part])
                    worst[part[worse]] = now.detach()[worse]
                    highest[part[worse]] = losses.detach()[worse]
                    holding.append(part[~broken])
                    if step < steps:
                        gradient = torch.autograd.grad(losses.sum(), now)[0]
                        x[part] = _step(now.detach(), gradient, originals[part], eps, alpha, norm)
                active = torch.cat(holding)
                if len(active) == 0:
                    return worst.to(images.dtype)
    return worst.to(images.dtype)


def bim(
    model: Classifier, images: Tensor, labels: Tensor, eps: float, *, alpha: float, steps: int
) -> Tensor:
    """Attack by the basic iterative method (Kurakin et al. 2017, 1607.02533): FGSM in small steps.

    It is `pgd` without a random start; arguments, returns and errors as there.
    """
    return pgd(model, images, labels, eps, alpha=alpha, steps=steps, random_start=False)


def rfgsm(
    model: Classifier, images: Tensor, labels: Tensor, eps: float, *, alpha: float, seed: int = 0
) -> Tensor:
    """Attack with one step from a random start (Wong et al. 2020, 2001.03994).

    It is `pgd` with a single step, of 1.25 `eps` in the source; arguments, returns and errors as
    there.
    """
    return pgd(model, images, labels, eps, alpha=alpha, steps=1, seed=seed)


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
