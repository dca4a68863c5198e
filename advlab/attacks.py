"""The fast gradient sign method (FGSM) and its iterations (PGD, BIM, MI-FGSM).

FGSM (Goodfellow et al. 2015, arXiv 1412.6572; paper, section 1.1) moves every pixel by `eps` in the
direction that raises the loss: ``clamp(x + eps * sign(gradient), 0, 1)``. The direction does not
depend on `eps`, so `fgsm_direction` computes it once and `perturb` applies it for any `eps`.

All gradients are taken in float32 and in eval mode, with respect to the images alone. The model is
left as it was found: each module's own mode, its buffers and its parameters' ``.grad``.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advlab.data import check_batch, check_integer, check_labels, check_name
from advlab.forward import (
    Classifier,
    ask,
    check_device,
    check_outputs,
    gradient_mode,
    gradient_of,
    per_image_statistics_mode,
    sharing,
)

NORMS = ("linf", "l2")
LOSSES = ("ce", "dlr", "margin")
COARSE = (torch.float16, torch.bfloat16)  # dtypes in which a step of an image is rounded


def check_eps(
    eps: float, name: str = "eps", norm: str = "linf", shape: Sequence[int] = (1,)
) -> float:
    """Return an eps or alpha as a float.

    Args:
        eps: A size in units of the pixel range [0, 1]; for "l2" a length over all pixels.
        name: What the error calls it.
        norm: One of `NORMS`.
        shape: For "l2", (C, H, W) of an image: black lies sqrt(C * H * W) from white.

    Raises:
        ValueError: if there is no such norm, or `eps` is no number from 0 to the distance of black
            from white, which is 1 for "linf".
    """
    check_name("norm", norm, NORMS)
    largest = 1.0 if norm == "linf" else math.sqrt(math.prod(shape))
    if isinstance(eps, Real) and not isinstance(eps, bool) and 0 <= eps <= largest:
        return float(eps)
    if norm == "linf":
        raise ValueError(
            f"{name} is {eps!r}; it must be a number from 0 to 1, in units of the pixel range "
            "[0, 1] (8 steps of an 8-bit image are 8/255)"
        )
    raise ValueError(
        f"{name} is {eps!r}; as an L2 length of images in [0, 1] it must be a number from 0 to "
        f"{largest:.1f}. Usual is 0.5; lengths of 8-bit images must be divided by 255"
    )


def check_targets(targeted: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return the classes that a targeted attack aims at, (N,) int64.

    Raises:
        TypeError, ValueError: as `data.check_labels`; also if a class is the image's own.
    """
    check_labels(targeted, images, "targets")
    same = int((targeted == labels).sum())
    if same:
        raise ValueError(
            f"{same} of {len(labels)} targets are the image's own class; aim at another one"
        )
    return targeted


def _craft(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    per_image_statistics: bool,
    make: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return what `make` makes of each part of the images and its gradient (`input_gradient`)."""
    check_batch(images, labels)
    check_device(model, images)
    # Reordering costs a single image more than it gains, and group_norm is slow in the other.
    usual = len(images) == 1 or per_image_statistics
    layout = torch.contiguous_format if usual else None

    def work(part: Tensor, targets: Tensor) -> Tensor:
        # Clones, outside inference mode: autograd refuses the tensors of that mode.
        x, targets = part.float().clone().requires_grad_(), targets.clone()
        logits = check_outputs(ask(model, x, layout), targets)
        # The sum, not the mean: each image's gradient is then its own, whatever the batch.
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return make(part, gradient_of(loss, x).contiguous())

    with (
        sharing(model, images) as share,
        gradient_mode(model, images.device),
        per_image_statistics_mode(model) if per_image_statistics else nullcontext(),
    ):
        return torch.cat(share(work, images.detach(), labels))


def input_gradient(
    model: Classifier, images: Tensor, labels: Tensor, *, per_image_statistics: bool = False
) -> Tensor:
    """Return the gradient of each image's cross entropy with respect to that image.

    Args:
        model: Maps images to logits (N, classes); any callable.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64, the true classes.
        per_image_statistics: Normalise by each image's own statistics, as the paper's attack did,
            not by the running ones (see `forward.per_image_statistics_mode`).

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: if images, labels or logits are not as above.
        TypeError: if images or labels have the wrong dtype.
    """
    return _craft(model, images, labels, per_image_statistics, lambda _, gradient: gradient)


def fgsm_direction(
    model: Classifier, images: Tensor, labels: Tensor, *, per_image_statistics: bool = False
) -> Tensor:
    """Return the sign of the loss gradient, the direction in which FGSM moves each pixel.

    Args, errors: as `input_gradient`.

    Returns:
        (N, C, H, W) int8 with values -1, 0 and 1; the same for every `eps`.
    """

    def signs(_: Tensor, gradient: Tensor) -> Tensor:  # the gradients of 50,000 fill 600 MB
        return gradient.sign().to(torch.int8)

    return _craft(model, images, labels, per_image_statistics, signs)


def perturb(images: Tensor, direction: Tensor, eps: float) -> Tensor:
    """Return ``clamp(images + eps * direction, 0, 1)``.

    Args:
        images: (N, C, H, W) float in [0, 1].
        direction: The same shape, signs.
        eps: Size of the step, as in `check_eps`.

    Raises:
        ValueError: if `eps` is out of range or the shapes differ.
    """
    if images.shape != direction.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and direction {tuple(direction.shape)} must have the "
            "same shape: a direction belongs to the images it was made from"
        )
    coarse = images.dtype in COARSE
    x = images.float() if coarse else images
    made = torch.add(x, direction, alpha=check_eps(eps)).clamp_(0, 1)
    return _round_towards(images, made) if coarse else made


def _round_towards(images: Tensor, made: Tensor) -> Tensor:
    """Return float32 images in the dtype of `images`, none of their pixels farther from those.

    In bfloat16 the numbers below 1 are 1/256 apart: rounding alone would leave the ball.
    """
    if images.dtype not in COARSE:
        return made.to(images.dtype)
    # From 0 on, the bits of floats count like integers; adding 0 turns -0 into 0.
    rounded = made.to(images.dtype) + 0.0
    change = rounded.float() - images.float()
    over = change.abs() > (made - images.float()).abs()
    back = rounded.view(torch.int16) - (change.sign() * over).to(torch.int16)
    return back.view(images.dtype)


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
        model, images, labels, per_image_statistics: As in `input_gradient`.
        eps: As in `perturb`.
        targeted: (N,) int64, classes to move towards, not the true ones; None moves away from the
            true class, wherever that leads.

    Returns:
        Attacked images, the same shape and dtype, in [0, 1] and at most `eps` from `images`.

    Raises:
        ValueError, TypeError: as `input_gradient`, `perturb` and `check_targets`.
    """
    check_eps(eps)
    away = 1
    if targeted is not None:
        check_batch(images, labels)
        away, labels = -1, check_targets(targeted, images, labels)

    def moved(x: Tensor, gradient: Tensor) -> Tensor:
        # Not by way of `fgsm_direction`: for a single image a detour through int8 can be measured.
        return perturb(x, gradient.sign().mul_(away).to(x.dtype), eps)

    return _craft(model, images, labels, per_image_statistics, moved)


def attack_loss(
    logits: Tensor, labels: Tensor, loss: str = "ce", targeted: Tensor | None = None
) -> Tensor:
    """Return what an attack raises, for each image.

    Args:
        logits: (N, classes); "dlr" needs at least 3 classes, and 4 if it is targeted.
        labels: (N,) int64, the true classes.
        loss: "ce": the cross entropy. "margin": the best other logit minus the true one, above 0
            once the image is broken (Carlini and Wagner 2017, 1608.04644). "dlr": that margin
            divided by the gap from the best to the third logit, so that scaling the logits changes
            nothing (Croce and Hein 2020, 2003.01690).
        targeted: (N,) int64; the same losses, towards these classes.

    Returns:
        (N,) of the logits' dtype.

    Raises:
        ValueError: if there is no such loss, or too few classes for it.
    """
    check_name("loss", loss, LOSSES)
    needed = 3 if targeted is None else 4
    if loss == "dlr" and logits.shape[1] < needed:
        raise ValueError(
            f'"dlr" needs {needed} logits or more, there are {logits.shape[1]}; use "margin"'
        )
    if loss != "dlr":
        measure = _margin if loss == "margin" else partial(F.cross_entropy, reduction="none")
        return measure(logits, labels) if targeted is None else -measure(logits, targeted)
    best = logits.topk(needed, dim=1).values
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


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


@dataclass(frozen=True)
class _Ball:
    """What may be reached around each image: `eps` in `norm`, cut to [0, 1]; and steps in it."""

    originals: Tensor
    eps: float
    alpha: float
    norm: str

    def start(self, generator: torch.Generator) -> Tensor:
        """Return a uniformly random point for every image."""
        shape = self.originals.shape
        how: Any = {"generator": generator, "dtype": torch.float32}
        if self.norm == "linf":
            noise = torch.rand(shape, **how).mul_(2).sub_(1).mul_(self.eps)
        else:
            noise = torch.randn(shape, **how)
            radius = torch.rand(len(noise), **how) ** (1 / noise[0].numel())
            noise *= (radius * self.eps / noise.flatten(1).norm(dim=1))[:, None, None, None]
        return noise.to(self.originals.device).add_(self.originals).clamp_(0, 1)

    def step(self, x: Tensor, gradient: Tensor, part: Tensor | slice) -> Tensor:
        """Go `alpha` along the gradient, then back into the ball; `part` numbers the images."""
        originals = self.originals[part]
        if self.norm == "linf":
            moved = x.add(gradient.sign(), alpha=self.alpha)
            return moved.clamp_(originals - self.eps, originals + self.eps).clamp_(0, 1)
        moved = x + self.alpha * gradient / _lengths(gradient).clamp_min(1e-12)
        change = moved.sub_(originals)
        # Cutting to [0, 1] afterwards brings each pixel nearer to the original: the ball is kept.
        change.mul_((self.eps / _lengths(change).clamp_min(1e-12)).clamp_max(1))
        return change.add_(originals).clamp_(0, 1)


@dataclass(frozen=True)
class _Goal:
    """What an attack wants: the loss that it raises, and when an image is broken."""

    labels: Tensor
    targeted: Tensor | None
    loss: str

    def judge(self, logits: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each image numbered by `part`, and whether it is broken."""
        own, found = self.labels[part], logits.detach().argmax(1)
        if self.targeted is None:
            return attack_loss(logits, own, self.loss), found != own
        aim = self.targeted[part]
        check_outputs(logits, aim)
        return attack_loss(logits, own, self.loss, aim), found == aim


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
    eot: int = 1,
    seed: int = 0,
) -> Tensor:
    """Attack `images` with many small steps that stay within `eps` (Madry et al. 2018, 1706.06083).

    Projected gradient descent: a step along the gradient (its sign for "linf", itself, made `alpha`
    long, for "l2"), back to within `eps` of the image and to [0, 1], and so on. An image leaves the
    batch as soon as the model gets it wrong, so weak models are attacked in a fraction of the time;
    the others keep the point of highest loss over all steps and restarts.

    Thirteen parameters: those by which every attack library of the field calls PGD.

    Args:
        model, images, labels: As in `input_gradient`.
        eps: Largest change: of a pixel for "linf", of the image as a whole for "l2" (see
            `check_eps`).
        alpha: Size of a step, in the same units, above 0.
        steps: How many steps.
        random_start: Begin at a random point within `eps` of each image, not at the image.
        restarts: How often to begin anew, with the images that still hold.
        targeted: (N,) int64, classes to reach, not the true ones; None: any wrong class will do.
        norm: "linf" or "l2".
        loss: As in `attack_loss`.
        eot: How often the model is asked at each step; its gradients and losses are averaged
            (expectation over transformation; Athalye et al. 2018, 1707.07397). For a model that
            answers at random, give 10 or more: above 1 no image leaves the batch, because a wrong
            answer may have been chance.
        seed: Of the random starts.

    Returns:
        As `fgsm`.

    Raises:
        ValueError: if a number is out of range, a shape is wrong, there is no such norm or loss, a
            target is the image's own class, or restarts would repeat the same attack.
        TypeError: if a dtype is wrong.
    """
    check_batch(images, labels)
    check_eps(eps, "eps", norm, images.shape[1:])
    if not check_eps(alpha, "alpha", norm, images.shape[1:]) > 0:
        raise ValueError(f"alpha is {alpha}; a step must have a size above 0")
    for name, count in (("steps", steps), ("restarts", restarts), ("eot", eot)):
        check_integer(name, count, 1)
    if restarts > 1 and not random_start:
        raise ValueError(
            f"restarts is {restarts} with random_start=False; give 1: without a random start every "
            "restart would be the same"
        )
    check_integer("seed", seed)
    check_device(model, images)
    aim = None if targeted is None else check_targets(targeted, images, labels).clone()
    with gradient_mode(model, images.device), sharing(model, images) as share:
        ball = _Ball(images.detach().float().clone(), eps, alpha, norm)
        goal = _Goal(labels.clone(), aim, loss)
        generator = torch.Generator().manual_seed(seed) if random_start else None
        made = _walk(model, share, ball, goal, steps, restarts, eot, generator)
        return _round_towards(images.detach(), made)


def _walk(
    model: Classifier,
    share: Callable[..., list[Tensor]],
    ball: _Ball,
    goal: _Goal,
    steps: int,
    restarts: int,
    eot: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the worst points that `restarts` walks of `steps` steps find, float32."""
    worst = ball.originals.clone()
    highest = worst.new_full((len(worst),), -math.inf)
    active = torch.arange(len(worst), device=worst.device)

    def go_on(x: Tensor, last: bool, part: Tensor) -> Tensor:
        """Judge the images numbered by `part`, let them take a step; return those that go on."""
        now = x[part].requires_grad_(not last)
        found, gradient = torch.zeros_like(highest[part]), torch.zeros(())
        for _ in range(eot):
            logits = check_outputs(ask(model, now), goal.labels[part])
            losses, broken = goal.judge(logits, part)
            found = found + losses.detach()
            if not last:  # one answer's graph at a time
                gradient = gradient + gradient_of(losses.sum(), now)
        if eot > 1:
            broken = torch.zeros_like(broken)
        worse = broken | (found > highest[part])
        worst[part[worse]] = now.detach()[worse]
        highest[part[worse]] = found[worse]
        if not last:
            x[part] = ball.step(now.detach(), gradient, part)
        return part[~broken]

    for _ in range(restarts):
        # For all images, so that an image's noise does not depend on which others hold.
        x = ball.start(generator) if generator else ball.originals.clone()
        for step in range(steps + 1):
            # All take a step before any takes the next: the parts stay full to the end.
            active = torch.cat(share(partial(go_on, x, step == steps), active))
            if len(active) == 0:
                return worst
    return worst


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


def mifgsm(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 10,
    decay: float = 1.0,
) -> Tensor:
    """Attack with momentum (MI-FGSM; Dong et al. 2018, 1710.06081), which transfers well.

    Each of the `steps` goes ``eps / steps`` along the sign of a running sum of gradients, each
    divided by its L1 length; the sum so far counts `decay`. Other arguments, returns and errors as
    in `fgsm`.

    Raises:
        ValueError: also if `steps` is below 1, or `decay` is negative or not finite.
    """
    check_batch(images, labels)
    check_eps(eps)
    check_integer("steps", steps, 1)
    if not isinstance(decay, Real) or not 0 <= decay < math.inf:
        raise ValueError(f"decay is {decay!r}; it must be a number from 0 on, and is usually 1")
    ball = _Ball(images.detach().float(), eps, eps / steps, "linf")
    x, momentum = ball.originals, 0.0
    for _ in range(steps):
        gradient = input_gradient(model, x, labels)
        momentum = decay * momentum + gradient / gradient.abs().sum((1, 2, 3), True).clamp_min(
            1e-12
        )
        x = ball.step(x, momentum, slice(None))
    return _round_towards(images.detach(), x)
