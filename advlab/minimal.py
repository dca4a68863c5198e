"""The shortest way out: attacks that look for the smallest change by which a model is fooled.

FGSM and PGD stay within an `eps` that somebody chose. These choose it themselves, for each image:
DeepFool and Carlini and Wagner's attack in L2 (the length of the change), JSMA in L0 (the number of
values that change). `distortion` measures what they found in three norms.

As in `attacks`, everything is computed in float32 and eval mode, an image's result does not depend
on the batch, and the model is left as it was found. An image that the model gets wrong as it is
comes back as it is, and so does one for which no way out was found; `distortion` tells them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from advlab.attacks import COARSE, attack_loss, check_targets
from advlab.data import TOLERANCE, check_batch, check_integer
from advlab.forward import (
    Classifier,
    ask,
    check_device,
    check_outputs,
    gradient_mode,
    gradient_of,
    holds,
    sharing,
)

LARGEST = 2**30  # bytes of the table of pairs that JSMA may fill
INSIDE = 0.999999  # black and white lie infinitely far out in the variable of Carlini and Wagner


def _check_number(name: str, value: Any, low: float, high: float, usual: str) -> float:
    """Return `value` if it is a number from `low` to `high`; a ValueError calls it `name`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and low <= value <= high and math.isfinite(value):
        return float(value)
    span = f"from {low:g} " + (f"to {high:g}" if math.isfinite(high) else "on")
    raise ValueError(f"{name} is {value!r}; it must be a number {span}, usual is {usual}")


@dataclass(frozen=True)
class _Hunt:
    """What the attacks have in common: the images, what is wanted of them, and what was found."""

    model: Classifier
    originals: Tensor  # (N, C, H, W) float32
    labels: Tensor
    aim: Tensor | None
    share: Callable[..., list[Any]]
    made: Tensor  # (N, C, H, W): where the model was fooled, else the original

    def judge(self, logits: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much the images numbered by `part` are past the border, and whether.

        The margin is that of `attacks.attack_loss`: above 0 the model is fooled.
        """
        own = self.labels[part]
        if self.aim is None:
            return attack_loss(logits, own, "margin"), logits.detach().argmax(1) != own
        aim = self.aim[part]
        check_outputs(logits, aim)
        return attack_loss(logits, own, "margin", aim), logits.detach().argmax(1) == aim

    def ask(self, x: Tensor, part: Tensor) -> Tensor:
        """Return the logits of `x`, which are images numbered by `part`."""
        return check_outputs(ask(self.model, x), self.labels[part])

    @torch.no_grad()
    def settle(self, x: Tensor, part: Tensor) -> Tensor:
        """Keep those of `x` that fool the model; return which of `part` they are, (n,) bool."""
        fooled = self.judge(self.ask(x, part), part)[1]
        self.made[part[fooled]] = x[fooled]
        return fooled

    def begin(self) -> tuple[Tensor, Tensor]:
        """Return the logits of all originals, and the numbers of those that are not yet fooled."""
        every = torch.arange(len(self.originals), device=self.originals.device)

        @torch.no_grad()
        def look(part: Tensor) -> Tensor:
            return self.ask(self.originals[part], part)

        logits = torch.cat(self.share(look, every))
        if logits.shape[1] < 2:
            raise ValueError("the model returned one logit an image; there is no other class")
        return logits, every[~self.judge(logits, every)[1]]

    def walk(self, step: Callable[[Tensor], Tensor], active: Tensor, most: int) -> None:
        """Let images take up to `most` steps; those whose numbers `step` returns go on."""
        for _ in range(most):
            if len(active) == 0:
                break
            active = torch.cat(self.share(step, active))


def _attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    targeted: Tensor | None,
    run: Callable[[_Hunt], None],
) -> Tensor:
    """Return what `run` finds for each image, in the dtype of `images`."""
    check_batch(images, labels)
    if images.dtype in COARSE:
        raise TypeError(
            f"images are {images.dtype}, whose steps are larger than a shortest way out; give "
            "images.float()"
        )
    check_device(model, images)
    aim = None if targeted is None else check_targets(targeted, images, labels).clone()
    with gradient_mode(model, images.device), sharing(model, images) as share:
        x = images.detach().float().clone()
        hunt = _Hunt(model, x, labels.clone(), aim, share, x.clone())
        run(hunt)
    kept = hunt.made == hunt.originals
    return torch.where(kept, images.detach(), hunt.made.to(images.dtype))


def _gradients(outputs: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of each output of each image with respect to that image.

    Args:
        outputs: (N, K), computed of `x`.
        x: (N, C, H, W).

    Returns:
        (N, K, C, H, W).

    Raises:
        ValueError: as `forward.gradient_of`.
    """
    found = []
    for column in outputs.unbind(1):
        gradient = None
        if column.requires_grad:
            (gradient,) = torch.autograd.grad(column.sum(), x, retain_graph=True, allow_unused=True)
        if gradient is None or not gradient.isfinite().all():
            gradient = gradient_of(outputs.sum(), x)  # says what is wrong with it
        found.append(gradient)
    return torch.stack(found, 1)


def deepfool(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    overshoot: float = 0.02,
    steps: int = 50,
    classes: int = 10,
) -> Tensor:
    """Go to the nearest border as if the model were linear, again and again (L2).

    DeepFool (Moosavi-Dezfooli et al. 2016, 1511.04599, Algorithm 2). The walk is the paper's; the
    model is asked at the end of the walk stretched by `overshoot`, since a linear model would keep
    it on the border for ever. On such a model the first step is the shortest way, but for the
    overshoot.

    Args:
        model, images, labels: As in `attacks.input_gradient`; the images float32 or float64.
        overshoot: By which share the walk is stretched, to end behind the border and not on it.
        steps: How many steps, at most; each takes `classes` gradients.
        classes: How many classes are looked at: the true one and the most likely others.

    Returns:
        Images of the same shape and dtype, in [0, 1]: just behind the border, or the original where
        the model is wrong already or no way out was found.

    Raises:
        ValueError, TypeError: as `attacks.input_gradient`; if a number is out of range, the images
            are of 16 bits, or the model has a single logit.
    """
    stretched = 1 + _check_number("overshoot", overshoot, 0, 1, "0.02")
    check_integer("steps", steps, 1)
    check_integer("classes", classes, 2)

    def run(hunt: _Hunt) -> None:
        logits, active = hunt.begin()
        own = hunt.labels[:, None]
        others = min(classes, logits.shape[1]) - 1
        rivals = logits.scatter(1, own, -math.inf).topk(others, dim=1).indices
        chosen, walk = torch.cat([own, rivals], 1), torch.zeros_like(hunt.originals)

        def step(part: Tensor) -> Tensor:
            start = hunt.originals[part]
            x = (start + walk[part]).clamp(0, 1).requires_grad_()
            outputs = hunt.ask(x, part).gather(1, chosen[part])
            gradients = _gradients(outputs, x)
            # Of each rival, the distance to the plane on which it is as likely as the true class.
            normals = gradients[:, 1:] - gradients[:, :1]
            gaps = (outputs[:, 1:] - outputs[:, :1]).detach().abs()
            lengths = normals.flatten(2).norm(dim=2).clamp_min(1e-12)
            nearest = (gaps / lengths).argmin(1)
            rows = torch.arange(len(part), device=part.device)
            size = (gaps / lengths**2)[rows, nearest]
            walk[part] += size[:, None, None, None] * normals[rows, nearest]
            fooled = hunt.settle((start + stretched * walk[part]).clamp(0, 1), part)
            return part[~fooled]

        hunt.walk(step, active, steps)

    return _attack(model, images, labels, None, run)


@dataclass
class _Adam:
    """The optimiser of Kingma and Ba (2015, 1412.6980) for images that may leave one by one."""

    first: Tensor
    second: Tensor
    rate: float

    def change(self, gradient: Tensor, part: Tensor, step: int) -> Tensor:
        """Return what to add to the images numbered by `part`, at the `step`-th step from 1."""
        self.first[part] = 0.9 * self.first[part] + 0.1 * gradient
        self.second[part] = 0.999 * self.second[part] + 0.001 * gradient**2
        mean, square = self.first[part] / (1 - 0.9**step), self.second[part] / (1 - 0.999**step)
        return -self.rate * mean / (square.sqrt() + 1e-8)


def carlini_wagner(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    kappa: float = 0.0,
    steps: int = 1_000,
    searches: int = 9,
    rate: float = 0.01,
    constant: float = 1e-3,
    targeted: Tensor | None = None,
) -> Tensor:
    """Minimise the length of the change and a loss that ends behind the border (L2).

    Carlini and Wagner (2017, 1608.04644, section VI): over `w`, where the image is
    ``(tanh(w) + 1) / 2`` and so always in [0, 1], Adam minimises the squared length plus c times
    ``max(kappa - margin, 0)``. A binary search finds for each image the smallest c that works:
    times ten until one does, then halfway between the last that failed and the last that worked. An
    image leaves a search when its lowest loss has not fallen by 0.01 % within a tenth of the steps
    (the authors' code compares the losses at both ends, for the whole batch). Kept is the shortest
    change ever seen.

    Args:
        model, images, labels: As in `deepfool`.
        kappa: By how much the wrong logit must exceed the true one; 0: any answer but the true one.
        steps: Of Adam in each search, at most; one gradient each. (The paper takes 10,000.)
        searches: How many c are tried for each image.
        rate: Adam's. Its first step changes each value by up to half of it, in L2 by 0.28 for 0.01
            and 3,072 values. Where the way out is shorter, the steps pass it by, and the change is
            too long unless there are many. Where `steps` of them end short of it, none is found.
        constant: The first c.
        targeted: (N,) int64, classes to reach, not the true ones; None: any wrong class will do.

    Returns:
        As `deepfool`.

    Raises:
        ValueError, TypeError: as `deepfool` and `attacks.check_targets`.
    """
    kappa = _check_number("kappa", kappa, 0, math.inf, "0")
    rate = _check_number("rate", rate, 1e-9, math.inf, "0.01")
    constant = _check_number("constant", constant, 1e-12, math.inf, "0.001")
    check_integer("steps", steps, 1)
    check_integer("searches", searches, 1)

    def run(hunt: _Hunt) -> None:
        logits, active = hunt.begin()
        if kappa:  # an image that is wrong, but not by so much, has to go on
            every = torch.arange(len(logits), device=logits.device)
            margin, fooled = hunt.judge(logits, every)
            active = every[~(fooled & (margin >= kappa))]
        start = ((2 * hunt.originals - 1) * INSIDE).atanh()
        originals = (start.tanh() + 1) / 2  # but for rounding; so that no change is exactly 0
        shortest = start.new_full((len(start),), math.inf)
        c, low = torch.full_like(shortest, constant), torch.zeros_like(shortest)
        high = shortest.clone()

        def search(w: Tensor, adam: _Adam, worked: Tensor) -> None:
            """Walk with one c for each image; note in `worked` where it was large enough."""
            before = torch.full_like(shortest, math.inf)
            lowest, checked = before.clone(), max(1, steps // 10)

            def go_on(step: int, part: Tensor) -> Tensor:
                tanh = w[part].tanh()
                x = ((tanh + 1) / 2).requires_grad_()
                margin, fooled = hunt.judge(hunt.ask(x, part), part)
                missing = c[part] * (kappa - margin).clamp_min(0)
                change = x.detach() - originals[part]
                square = change.flatten(1).square().sum(1)
                fooled &= margin.detach() >= kappa
                worked[part] |= fooled
                better = fooled & (square < shortest[part])
                hunt.made[part[better]] = x.detach()[better]
                shortest[part[better]] = square[better]
                gradient = gradient_of(missing.sum(), x) + 2 * change
                inner = (1 - tanh**2) / 2  # the derivative of the image by w
                w[part] += adam.change(gradient * inner, part, step)
                lowest[part] = lowest[part].minimum(square + missing.detach())
                stuck = torch.zeros_like(fooled)
                if (step - 1) % checked == 0:
                    stuck = lowest[part] > 0.9999 * before[part]
                    before[part] = lowest[part]
                return part[~stuck]

            left = active
            for step in range(1, steps + 1):
                left = torch.cat(hunt.share(partial(go_on, step), left))
                if len(left) == 0:
                    break

        for _ in range(searches):
            if len(active) == 0:
                break
            worked = torch.zeros(len(start), dtype=torch.bool, device=start.device)
            adam = _Adam(torch.zeros_like(start), torch.zeros_like(start), rate)
            search(start.clone(), adam, worked)
            high, low = torch.where(worked, c, high), torch.where(worked, low, c)
            c = torch.where(high.isinf(), 10 * c, (low + high) / 2)

    return _attack(model, images, labels, targeted, run)


def _best_value(gains: Tensor, losses: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image the value of highest saliency, (N, 1), and whether there is one."""
    saliency = gains.clamp_min(0) * losses.clamp_max(0).neg() * free
    best = saliency.max(1, keepdim=True)
    return best.indices, best.values[:, 0] > 0


def _best_pair(gains: Tensor, losses: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image the two values of highest saliency, (N, 2), and whether there are."""
    pairs = torch.zeros(len(gains), 2, dtype=torch.int64, device=gains.device)
    there = torch.zeros(len(gains), dtype=torch.bool, device=gains.device)
    for row, (gain, loss, open_) in enumerate(zip(gains, losses, free, strict=True)):
        places = open_.nonzero()[:, 0]
        if len(places) < 2:
            continue
        gain, loss = gain[places], loss[places]
        table = (gain[:, None] + gain).clamp_min_(0)  # D x D numbers, and once more
        table *= (loss[:, None] + loss).clamp_max_(0)
        table.fill_diagonal_(0)
        at = int(table.argmin())
        there[row] = table.view(-1)[at] < 0
        pairs[row] = torch.stack([places[at // len(places)], places[at % len(places)]])
    return pairs, there


def jsma(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    theta: float = 1.0,
    gamma: float = 0.145,
    pairs: bool = True,
    targeted: Tensor | None = None,
) -> Tensor:
    """Change as few values as possible, those of highest saliency first (L0).

    The Jacobian-based saliency map attack (Papernot et al. 2016, 1511.07528, Algorithms 2 and 3).
    A value is one channel of one pixel. Where raising it raises the target's logit and lowers the
    sum of the others, its saliency is the product of the two slopes. The paper looks at pairs, so
    that one value may make up for the other. The table of all pairs holds D x D numbers: 38 MB for
    the D = 3,072 values of CIFAR-10, 84 GiB for the 150,528 of ImageNet.

    Args:
        model, images, labels: As in `deepfool`.
        theta: What is added to a value, then cut to [0, 1]; below 0 values are lowered.
        gamma: Which share of the values may be changed; the paper's is 0.145.
        pairs: Two values a step, as in the paper; False: one, the variant without the table.
        targeted: (N,) int64, classes to reach, not the true ones. None: of each image the most
            likely wrong class. (The paper knows targeted attacks alone.)

    Returns:
        As `deepfool`; fooled is an image whose target was reached.

    Raises:
        ValueError, TypeError: as `deepfool` and `attacks.check_targets`; if the table of pairs
            would fill more than 1 GiB.
    """
    if _check_number("theta", theta, -1, 1, "1") == 0:
        raise ValueError("theta is 0, and no value would change; usual is 1")
    _check_number("gamma", gamma, 0, 1, "0.145")
    sign = math.copysign(1, theta)

    def run(hunt: _Hunt) -> None:
        count = hunt.originals[0].numel()
        if pairs and 4 * count**2 > LARGEST:
            raise ValueError(
                f"pairs of {count:,} values are a table of {4 * count**2 / 2**30:,.1f} GiB an "
                "image; give pairs=False, or smaller images"
            )
        logits, active = hunt.begin()
        aim = hunt.aim
        if aim is None:  # the runner-up
            aim = logits.scatter(1, hunt.labels[:, None], -math.inf).argmax(1)
            hunt = replace(hunt, aim=aim)
        x = hunt.originals.clone()

        def step(part: Tensor) -> Tensor:
            now = x[part].requires_grad_()
            logits = hunt.ask(now, part)
            target = logits.gather(1, aim[part, None])[:, 0]
            # Two gradients take the place of the whole Jacobian: nothing else of it is asked for.
            slopes = _gradients(torch.stack([target, logits.sum(1) - target], 1), now)
            gains, losses = (sign * slopes).flatten(2).unbind(1)
            values = x[part].flatten(1)
            free = values < 1 if theta > 0 else values > 0
            places, there = (_best_pair if pairs else _best_value)(gains, losses, free)
            part, places, values = part[there], places[there], values[there]
            moved = (values.gather(1, places) + theta).clamp(0, 1)
            x[part] = values.scatter(1, places, moved).reshape(x[part].shape)
            return part[~hunt.settle(x[part], part)] if len(part) else part

        hunt.walk(step, active, int(gamma * count) // (2 if pairs else 1))

    return _attack(model, images, labels, targeted, run)


def distortion(
    model: Classifier, images: Tensor, labels: Tensor, attacked: Tensor
) -> dict[str, Tensor]:
    """Return how far each image had to be changed until the model got it wrong.

    Args:
        model, images, labels: As in `attacks.input_gradient`.
        attacked: Like `images`, what an attack made of them.

    Returns:
        By norm, (N,) float32: "l0", how many values differ by more than 1e-6; "l2", the length of
        the change; "linf", the largest change of a value. In each, 0 for an image that the model
        gets wrong as it is, inf for one that it still gets right.

    Raises:
        ValueError, TypeError: as `forward.holds`; if the shapes differ.
    """
    check_batch(images, labels)
    if not isinstance(attacked, Tensor) or attacked.shape != images.shape:
        shape = tuple(attacked.shape) if isinstance(attacked, Tensor) else type(attacked).__name__
        raise ValueError(
            f"attacked is {shape}, the images are {tuple(images.shape)}; give what was made of them"
        )
    right, still = holds(model, images, labels), holds(model, attacked, labels)
    change = (attacked.detach() - images.detach()).float().flatten(1)
    sizes = {
        "l0": (change.abs() > TOLERANCE).sum(1).float(),
        "l2": change.norm(dim=1),
        "linf": change.abs().amax(1),
    }
    return {
        norm: size.masked_fill(still, math.inf).masked_fill(~right, 0.0)
        for norm, size in sizes.items()
    }
