"""What can be proved of a network: randomised smoothing in L2, interval bounds in L-inf.

An attack that fails proves nothing: a better one may succeed. These two give the other end. Within
the radius that `certify` returns *no* change of an image alters the answer (of the network that
votes under noise, not of the network itself). Where `worst_margins` is above 0, no change of at
most `eps` a value makes the network wrong.

As everywhere, a model is asked in float32 and eval mode, and left as it was found.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab.attacks import COARSE, check_eps
from advlab.data import check_batch, check_images, check_integer, check_labels
from advlab.forward import (
    CHUNK,
    Classifier,
    ask,
    check_device,
    check_outputs,
    eval_mode,
    float32_mode,
    sharing,
)
from advlab.machine import progress_bar
from advlab.models import CNN

ABSTAIN = -1  # in place of a class
AT_ONCE = 1_000  # noisy copies of an image in memory: 12 MB of CIFAR-10
Interval = tuple[Tensor, Tensor]  # centres and radii (half the widths) of the values of a layer


# --- randomised smoothing


def check_sigma(sigma: float) -> float:
    """Return the standard deviation of a noise as a float.

    Raises:
        ValueError: if it is no finite number above 0.
    """
    if isinstance(sigma, Real) and not isinstance(sigma, bool) and 0 < sigma < math.inf:
        return float(sigma)
    raise ValueError(
        f"sigma is {sigma!r}; it must be a number above 0, in units of the pixel range [0, 1]. "
        "Usual are 0.12, 0.25 and 0.5"
    )


def check_alpha(alpha: float) -> float:
    """Return the probability of an error as a float.

    Raises:
        ValueError: if it is no number between 0 and 1, both left out.
    """
    if isinstance(alpha, Real) and not isinstance(alpha, bool) and 0 < alpha < 1:
        return float(alpha)
    raise ValueError(
        f"alpha is {alpha!r}; it is the probability that a proof is wrong, so it must lie between "
        "0 and 1. Usual is 0.001"
    )


def clopper_pearson(successes: int, n: int, alpha: float) -> float:
    """Return a lower bound of a probability, by Clopper and Pearson (1934; exact, one-sided).

    Whatever the probability of a success is, with probability 1 - `alpha` at least it is no less
    than the bound.

    Args:
        successes: Of `n` independent trials.
        n: How many trials.
        alpha: Probability of an error.

    Returns:
        The largest p from which `successes` or more come with probability `alpha` at most; 0 for
        no success.

    Raises:
        ValueError: if not 0 <= successes <= n, n is 0, or alpha is not as in `check_alpha`.
    """
    check_integer("n", n, 1)
    if check_integer("successes", successes) > n:
        raise ValueError(f"successes is {successes}, of n = {n} trials")
    return _lower_bound(successes, n, check_alpha(alpha))


@cache
def _lower_bound(successes: int, n: int, alpha: float) -> float:
    if successes == 0:
        return 0.0
    counts = torch.arange(successes, n + 1, dtype=torch.float64)
    choices = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    low, high = 0.0, 1.0  # from `low` so many come with probability alpha at most
    while low < (middle := (low + high) / 2) < high:
        logs = choices + counts * math.log(middle) + (n - counts) * math.log1p(-middle)
        if float(torch.logsumexp(logs, 0)) <= math.log(alpha):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Certificates:
    """What was proved of each image.

    Args:
        answers: (N,) int64 on the CPU, the class that the vote names, or `ABSTAIN`.
        radii: (N,) float64 on the CPU: at any distance (L2) below, the vote names the same class.
            0 where it abstains.
        counts: (N,) int64 on the CPU, how many of the n copies were given that class (where it
            abstains, the class that seemed the most frequent).
    """

    answers: Tensor
    radii: Tensor
    counts: Tensor

    def hold(self, labels: Tensor, radius: float = 0.0) -> Tensor:
        """Return for which images it is proved that the vote is right within `radius`, (N,) bool.

        Raises:
            ValueError: if there are not as many labels, or `radius` is below 0.
        """
        check_labels(labels.cpu(), self.answers)
        if not radius >= 0:
            raise ValueError(f"radius is {radius}; a distance is 0 or more")
        return (self.answers == labels.cpu()) & (self.radii > radius)


def certify(
    model: Classifier,
    images: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 1_000,
    alpha: float = 0.001,
    seed: int = 0,
    progress: str | None = None,
) -> Certificates:
    """Prove how far an image may be changed before the vote under noise changes its answer.

    Randomised smoothing (Cohen et al. 2019, 1902.02918, Theorem 1 and the procedure CERTIFY). The
    *smoothed* classifier names the class that `model` is most likely to name when Gaussian noise is
    added to the image. If that class has at least the probability p > 1/2, no change shorter than
    ``sigma * quantile(p)`` alters the vote, whatever the network is; the quantile is that of the
    normal distribution. The probability is not known, so it is bounded from below by counting
    (`clopper_pearson`). Each image's certificate is wrong with probability `alpha` at most.

    Args:
        model: Maps images to logits; it is shown images outside of [0, 1], as noise makes them.
        images: (N, C, H, W) float in [0, 1].
        sigma: Standard deviation of the noise of each value, in units of the pixel range.
        n0: Noisy copies by which a class is chosen. They are not counted: a class that is chosen
            *because* it was frequent would look more frequent than it is.
        n: Noisy copies by which its probability is bounded. They set a ceiling for the radius,
            ``sigma * quantile(alpha ** (1 / n))``.
        alpha: Probability that the certificate of an image is wrong.
        seed: Of the noise. An image's noise depends on its place in the batch as well.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        Answers and radii.

    Raises:
        ValueError, TypeError: if `images` is not as in `data.check_images`, a number is out of
            range, or the model's answer is not as in `forward.ask`: so also if a function calls a
            model in training mode.
    """
    check_images(images)
    check_device(model, images)
    scale = check_sigma(sigma)
    for name, count in (("n0", n0), ("n", n)):
        check_integer(name, count, 1)
    check_alpha(alpha)
    check_integer("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    chosen, counts = [], []
    with (
        torch.no_grad(),
        eval_mode(model),
        float32_mode(images.device),
        progress_bar(progress, len(images), "image") as bar,
    ):
        for image in images.detach().float().split(1):
            chosen.append(int(_votes(model, image, scale, n0, generator).argmax()))
            counts.append(int(_votes(model, image, scale, n, generator)[chosen[-1]]))
            bar.update()
    bounds = [_lower_bound(count, n, float(alpha)) for count in counts]
    radii = [scale * NormalDist().inv_cdf(p) if p > 0.5 else 0.0 for p in bounds]
    answers = [k if radius > 0 else ABSTAIN for k, radius in zip(chosen, radii, strict=True)]
    return Certificates(
        torch.tensor(answers), torch.tensor(radii, dtype=torch.float64), torch.tensor(counts)
    )


def _votes(
    model: Classifier, image: Tensor, sigma: float, n: int, generator: torch.Generator
) -> Tensor:
    """Return how often `model` names each of its outputs for `n` noisy copies of an image."""
    votes = torch.zeros((), dtype=torch.int64)
    with sharing(model, image.expand(n, -1, -1, -1)) as share:
        for start in range(0, n, AT_ONCE):
            size = (min(AT_ONCE, n - start), *image.shape[1:])
            noise = torch.randn(size, generator=generator, dtype=torch.float32).to(image.device)
            logits = torch.cat(share(partial(ask, model), image + sigma * noise))
            votes = votes + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return votes


# --- interval bounds


def _affine(layer: nn.Conv2d | nn.Linear, interval: Interval) -> Interval:
    # The centre goes through the layer. Each radius counts with the size of its weight: at worst
    # all values move against us at once.
    centre, radius = interval
    if isinstance(layer, nn.Linear):
        return layer(centre), F.linear(radius, layer.weight.abs())
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"a Conv2d has padding_mode {layer.padding_mode!r}; bounds are known for 'zeros' alone"
        )
    how: Any = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return layer(centre), F.conv2d(radius, layer.weight.abs(), **how)


def _batch_norm(layer: nn.BatchNorm2d, interval: Interval) -> Interval:
    # In eval mode it is affine, channel by channel.
    if layer.running_var is None:
        raise ValueError(
            "a BatchNorm2d keeps no running statistics, so an image's answer depends on the batch "
            "and has no bounds of its own"
        )
    centre, radius = interval
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()
    return layer(centre), radius * scale[:, None, None]


def _monotone(layer: nn.Module, interval: Interval) -> Interval:
    # What grows with each of its inputs maps lower ends to lower ends, and upper to upper.
    centre, radius = interval
    low, high = layer(centre - radius), layer(centre + radius)
    return (low + high) / 2, (high - low) / 2


RULES: dict[type[nn.Module], Callable[[Any, Interval], Interval]] = {
    nn.Conv2d: _affine,
    nn.Linear: _affine,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _monotone,
    nn.Flatten: _monotone,
    nn.MaxPool2d: _monotone,
    nn.AvgPool2d: _monotone,
}


def _layers(module: Any) -> list[nn.Module]:
    """Return the layers of a network in the order in which an image passes through them.

    Raises:
        ValueError: names what has no rule. A class derived from a known one may compute anything,
            and so may a hook.
    """
    kind = type(module)
    if not isinstance(module, nn.Module):
        raise ValueError(f"the layers of a {kind.__name__} cannot be seen; give the nn.Module")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"a {kind.__name__} has hooks, which may change its result; remove them")
    if kind is CNN:
        return _layers(module.network)
    if kind is nn.Sequential:
        return [layer for child in module._modules.values() for layer in _layers(child)]
    if kind not in RULES:
        known = ", ".join(sorted(rule.__name__ for rule in RULES))
        raise ValueError(f"no interval bounds are known for {kind.__name__}; known are {known}")
    return [module]


@torch.no_grad()
def _pass(model: Classifier, layers: list[nn.Module], images: Tensor, eps: float) -> list[Interval]:
    """Return the bounds of what comes out of the last of `layers`, for each part of the images."""
    parts, weights = [], [w for layer in layers for w in layer.parameters()]
    dtype = weights[0].dtype if weights else torch.float32
    if dtype in COARSE:
        raise TypeError(
            f"the weights are {dtype}, which rounds by more than a proof can leave out; give "
            "model.float()"
        )
    with eval_mode(model), float32_mode(images.device):
        for part in images.detach().to(dtype).split(CHUNK):
            low, high = (part - eps).clamp(0, 1), (part + eps).clamp(0, 1)
            interval = (low + high) / 2, (high - low) / 2
            for layer in layers:
                interval = RULES[type(layer)](layer, interval)
            parts.append(interval)
    return parts


def interval_bounds(model: Classifier, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Bound each logit over all images within `eps` (L-inf) of each image, and in [0, 1].

    Interval bound propagation (Gowal et al. 2018, 1810.12715, section 3). Every value of a layer
    is replaced by an interval that holds it. That is sound; but each layer forgets which of its
    inputs move together, so the intervals grow from layer to layer.

    Args:
        model: `nn.Sequential`, or the paper's CNN, of layers in `RULES`; its weights float32 (or
            float64: the bounds are then, too).
        images: (N, C, H, W) float in [0, 1].
        eps: From 0 to 1.

    Returns:
        Lower and upper bounds, each (N, outputs) float32. They are those of exact arithmetic:
        rounding may put a logit outside of them by about a millionth of its size.

    Raises:
        ValueError, TypeError: if `images` or `eps` is out of range, the model has a layer without a
            rule (it is named) or weights of 16 bits, or bounds are not finite.
    """
    check_images(images)
    check_device(model, images)
    parts = _pass(model, _layers(model), images, check_eps(eps))
    centre, radius = (_finite(torch.cat(part)) for part in zip(*parts, strict=True))
    return centre - radius, centre + radius


def worst_margins(model: Classifier, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Bound from below by how much the true logit leads, over all images within `eps` (L-inf).

    As in `interval_bounds`; but if the last layer is linear, the difference of two logits is
    bounded as *one* number (Gowal et al. 2018, section 3): bounds of the two apart would let one
    value help both. So on a linear network the bound is exact.

    Args:
        model, images, eps: As in `interval_bounds`.
        labels: (N,) int64, the true classes.

    Returns:
        (N,) float32. Above 0 the network is right on every image within `eps`. Below 0 nothing is
        proved.

    Raises:
        ValueError, TypeError: as `interval_bounds`; if a label has no logit, or there is no other
            one.
    """
    check_batch(images, labels)
    check_device(model, images)
    *layers, last = _layers(model)
    parts = _pass(model, layers, images, check_eps(eps))
    with torch.no_grad(), float32_mode(images.device):
        leads = [_leads(last, *part) for part in zip(parts, labels.split(CHUNK), strict=True)]
    return _finite(torch.cat(leads))


def _leads(last: nn.Module, interval: Interval, labels: Tensor) -> Tensor:
    """Return a lower bound of the true logit minus the highest other one, for what enters `last`.

    Raises:
        ValueError: as `worst_margins`.
    """
    centre, radius = interval
    if isinstance(last, nn.Linear):
        logits = check_outputs(last(centre), labels)
        spread = torch.empty_like(logits)
        for label in labels.unique():
            mine, weight = labels == label, last.weight - last.weight[label]
            spread[mine] = F.linear(radius[mine], weight.abs())
        lower = logits.gather(1, labels[:, None]) - logits - spread
    else:
        centre, radius = RULES[type(last)](last, interval)
        low = check_outputs(centre - radius, labels)
        lower = low.gather(1, labels[:, None]) - (centre + radius)
    if lower.shape[1] < 2:
        raise ValueError("the model returned one logit an image; there is no other class")
    return lower.scatter(1, labels[:, None], math.inf).amin(1)


def _finite(bounds: Tensor) -> Tensor:
    """Return `bounds` if all are finite.

    Raises:
        ValueError: otherwise.
    """
    if not bounds.isfinite().all():
        raise ValueError(
            "a bound is NaN or infinite, and nothing is proved by it. Look for weights or running "
            "variances that are"
        )
    return bounds
