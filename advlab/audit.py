"""The audit: a checklist that tells robustness from its appearance.

All lines but the last judge a measurement: whether the attacks did what honest attacks do. The last
one judges a claim. A model that hides nothing and is not robust passes the others.

From Athalye et al. 2018 (1802.00420, section 3.1) and Carlini et al. 2019 (1902.06705). A line that
fails does not prove that the model is weak, but that its figures cannot be trusted before somebody
has found out why.

A threshold comes from the figures themselves. Two accuracies on the same images count as the same
if they are `Trial.near`, which shrinks as n grows; a share that should be 0 counts only if its 95 %
Wilson interval (Wilson 1927; `evaluation.wilson`) lies above 1 %, which takes 3 of 100 images or 10
of 500; and where two attacks are compared of which either may be the stronger on an honest model,
their intervals must not overlap.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab.adaptive import has_gradient, share_held
from advlab.attacks import attack_loss, check_eps, input_gradient, perturb, pgd
from advlab.autoattack import answers_vary, auto_attack
from advlab.catalogue import ATTACKS
from advlab.data import check_batch
from advlab.evaluation import wilson
from advlab.forward import CHUNK, PIXELS, Classifier, predict
from advlab.minimal import deepfool, distortion

TRANSFER_SIZES = (0.05, 0.1)  # beside eps itself
HUGE = 0.5
LITTLE = 0.01  # a share that should be 0 counts once its interval lies above this
TINY = 0.25 / 255  # a step so small that every honest model is nearly linear along it
ASKS = 5  # how often a model that answers at random is asked about each image
DRAWS = 10  # and over how many answers its gradients are averaged


class Rescaled(nn.Module):
    """A model whose logits are divided: the same answers, in the middle of the softmax."""

    def __init__(self, model: Classifier, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, images: Tensor) -> Tensor:
        """Return the divided logits."""
        return self.model(images) / self.by


@dataclass(frozen=True)
class Trial:
    """One model on trial; what several lines ask for is measured once.

    Args:
        model: The model.
        images: (N, C, H, W) float in [0, 1]; a few hundred are enough.
        labels: (N,) int64, the true classes.
        source: Another model, from which attacks are transferred; None leaves that line out.
        eps: The threat model, L-inf.
        seed: Of noise and random starts.
        classes: How many the data have; None leaves the line out that looks for other answers.
        claim: The accuracy, a share, that somebody claims under every change within `eps`; None
            leaves that line out.

    Raises:
        ValueError, TypeError: if images, labels or `eps` are not as above, or `eps` is 0, or a
            label is none of the classes, or `claim` no share.
    """

    model: Classifier
    images: Tensor
    labels: Tensor
    source: Classifier | None = None
    eps: float = 8 / 255
    seed: int = 0
    classes: int | None = None
    claim: float | None = None

    def __post_init__(self) -> None:
        if not check_eps(self.eps) > 0:
            raise ValueError(f"eps is {self.eps}; a trial needs attacks of a size above 0")
        if self.claim is not None and not 0 <= self.claim <= 1:
            raise ValueError(f"claim is {self.claim}; an accuracy is a share, from 0 to 1")
        check_batch(self.images, self.labels)
        highest = int(self.labels.max())
        if self.classes is not None and highest >= self.classes:
            raise ValueError(f"classes is {self.classes}, but there is a label {highest}")

    def share(self, shown: Tensor) -> float:
        """Return the accuracy of the model on `shown`, versions of the images.

        That of a model that answers at random is the mean over `ASKS` answers.
        """
        asks = ASKS if self.random else 1
        return float(share_held(self.model, shown, self.labels, asks).mean())

    def under(self, attack: str, eps: float) -> float:
        """Return the accuracy under an attack of `catalogue.ATTACKS`, white box."""
        made = ATTACKS[attack](self.model, self.images, self.labels, eps, seed=self.seed)
        return self.share(made)

    def _one_step(self, maker: Classifier, sizes: Sequence[float]) -> list[float]:
        """Return accuracies under FGSM made on `maker`: one direction for every size."""
        signs = ATTACKS["fgsm"].direction(maker, self.images, self.labels)
        return [self.share(perturb(self.images, signs, eps)) for eps in sizes]

    @cached_property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return self.share(self.images)

    @cached_property
    def noise(self) -> float:
        """Accuracy under random signs."""
        return self.under("noise", self.eps)

    @cached_property
    def sweep(self) -> list[float]:
        """Accuracies under FGSM at a quarter, a half, three quarters of eps, and eps."""
        return self._one_step(self.model, [self.eps * part / 4 for part in (1, 2, 3, 4)])

    @cached_property
    def walked(self) -> Tensor:
        """The images under PGD-20."""
        return ATTACKS["pgd-20"](self.model, self.images, self.labels, self.eps, seed=self.seed)

    @cached_property
    def iterated(self) -> float:
        """Accuracy under PGD-20."""
        return self.share(self.walked)

    @cached_property
    def on_margin(self) -> float:
        """Accuracy under PGD-20 on the margin, which no factor on the logits hides."""
        attack = partial(pgd, alpha=self.eps / 8, steps=20, loss="margin", seed=self.seed)
        return self.share(attack(self.model, self.images, self.labels, self.eps))

    @cached_property
    def random(self) -> bool:
        """Whether the model answers differently when asked again."""
        return answers_vary(self.model, self.images)

    @cached_property
    def has_gradient(self) -> bool:
        """Whether a gradient leads from the model's answers to the pixels."""
        return has_gradient(self.model, self.images)

    @cached_property
    def averaged(self) -> float | None:
        """Accuracy of a model that answers at random under PGD-20 with EOT; None of any other.

        EOT: each gradient is the mean over `DRAWS` answers.
        """
        if not self.random:
            return None
        attack = partial(pgd, alpha=self.eps / 8, steps=20, eot=DRAWS, seed=self.seed)
        return self.share(attack(self.model, self.images, self.labels, self.eps))

    @cached_property
    def converged(self) -> float:
        """Accuracy under 100 steps from two other random starts."""
        attack = partial(pgd, alpha=self.eps / 10, steps=100, restarts=2, seed=self.seed + 1)
        return self.share(attack(self.model, self.images, self.labels, self.eps))

    @cached_property
    def transfer(self) -> list[float]:
        """Accuracies under FGSM made on `source`, at eps and at `TRANSFER_SIZES`; none without."""
        return self._one_step(self.source, (self.eps, *TRANSFER_SIZES)) if self.source else []

    @cached_property
    def huge(self) -> float:
        """Accuracy under PGD-20 at eps 0.5, with which any image can be made grey."""
        return self.under("pgd-20", HUGE)

    @cached_property
    def square(self) -> float | None:
        """Accuracy under Square, which asks for no gradient; None without its package.

        None for a random model, too: Square keeps whatever was once drawn in its favour.
        """
        if self.random:
            return None
        try:
            attack = partial(auto_attack, attacks=["square"], seed=self.seed, queries=1_000)
            held = attack(self.model, self.images, self.labels, self.eps)
        except ImportError:
            return None
        return float(held.float().mean())

    @cached_property
    def white(self) -> float:
        """Accuracy under the strongest of the white-box attacks."""
        found = [self.sweep[-1], self.iterated, self.converged]
        return min(found if self.averaged is None else [*found, self.averaged])

    @cached_property
    def worst(self) -> float:
        """Accuracy under the strongest of all attacks within `eps` that were tried."""
        found = [self.noise, *self.transfer[:1]]
        if self.has_gradient:
            found += [self.white, self.on_margin, *self.sweep]
        return min(found if self.left_by_square is None else [*found, self.left_by_square])

    @cached_property
    def lengths(self) -> Tensor | None:
        """How long, in L2, DeepFool's changes are of the images that are right: (M,) float32.

        inf where it found none. None where it cannot say: without a gradient, or where the model
        answers at random.
        """
        if self.random or not self.has_gradient:
            return None
        # It holds ten gradients of each image at once; of large images it gets fewer.
        height, width = self.images.shape[2:]
        few = max(1, CHUNK * PIXELS // max(height * width, PIXELS))
        parts = zip(self.images.split(few), self.labels.split(few), strict=True)
        made = torch.cat([deepfool(self.model, *part) for part in parts])
        found = distortion(self.model, self.images, self.labels, made)["l2"]
        return found[found > 0]

    @property
    def left_by_square(self) -> float | None:
        """Accuracy under Square, as `square`; None, too, where the white box leaves nothing."""
        return None if self.has_gradient and self.white <= self.near else self.square

    @property
    def near(self) -> float:
        """By how much two accuracies on the same images differ by chance.

        Two standard deviations, if a tenth of the images change sides.
        """
        return max(0.01, 2 * math.sqrt(0.1 / len(self.images)))

    def interval(self, share: float) -> tuple[float, float]:
        """Return (low, high) of the 95 % Wilson interval of a share of the images."""
        return wilson(round(share * len(self.images)), len(self.images))

    def checklist(self) -> pd.DataFrame:
        """Return a row per line: check, verdict ("pass", "ALARM" or "not run"), measured, n.

        Of a model that is right by chance or less nothing else is asked, and of one without a
        gradient nothing that needs one.
        """
        rows, learned = [], _above_chance(self)[0] is not False
        for check, judge in CHECKLIST:
            if not learned and judge is not _above_chance:
                passed, measured = None, "clean accuracy is at chance"
            elif judge not in WITHOUT_GRADIENT and not self.has_gradient:
                passed, measured = None, "needs a gradient"
            else:
                passed, measured = judge(self)
            verdict = "not run" if passed is None else "pass" if passed else "ALARM"
            n = len(self.images)
            rows.append({"check": check, "verdict": verdict, "measured": measured, "n": n})
        return pd.DataFrame(rows)

    def accuracies(self) -> pd.DataFrame:
        """Return what was measured, a row each: test, eps, accuracy, low, high, correct, n."""
        eps, n = self.eps, len(self.images)
        sizes = (eps, *TRANSFER_SIZES) if self.source else ()
        found: list[tuple[str, float, float | None]] = [
            ("clean", 0.0, self.clean),
            ("noise", eps, self.noise),
        ]
        if self.has_gradient:
            found += [("FGSM", eps * k / 4, value) for k, value in enumerate(self.sweep, 1)]
            found += [
                ("PGD, 20 steps", eps, self.iterated),
                (f"PGD, 20 steps, {DRAWS} answers a step", eps, self.averaged),
                ("PGD, 100 steps x 2", eps, self.converged),
                ("PGD, 20 steps", HUGE, self.huge),
            ]
        found += [("FGSM, transfer", s, v) for s, v in zip(sizes, self.transfer, strict=True)]
        found.append(("Square, 1,000 queries", eps, self.left_by_square))
        rows = []
        for test, size, value in found:
            if value is not None:
                correct = round(value * n)
                rows.append((test, size, correct / n, *wilson(correct, n), correct, n))
        columns = ["test", "eps", "accuracy", "low", "high", "correct", "n"]
        return pd.DataFrame(rows, columns=columns)


def _percent(text: str, *values: float) -> str:
    return text.format(*(f"{100 * value:.1f} %" for value in values))


def _above_chance(t: Trial) -> tuple[bool | None, str]:
    # Whoever always names the most frequent class knows nothing of the images.
    chance = float(t.labels.bincount().max()) / len(t.labels)
    told = _percent("clean {}, the most frequent class {}", t.clean, chance)
    return (t.interval(t.clean)[0] > chance, told) if chance < 1 else (None, "needs two classes")


def _same_answer(t: Trial) -> tuple[bool | None, str]:
    if not t.random:
        return True, "asked 5 times: the same logits"
    told = "asked 5 times: other logits; average gradients over answers (EOT, pgd's eot)"
    if t.averaged is None or not t.has_gradient:
        return False, told
    return False, told + _percent(f": {DRAWS} a step {{}}, 1 a step {{}}", t.averaged, t.iterated)


def _leads_back(t: Trial) -> tuple[bool | None, str]:
    if t.has_gradient:
        return True, "there is a gradient"
    told = "the logits carry no gradient; put a function that has one in the place of what stops "
    return False, told + "it (BPDA, adaptive.StraightThrough)"


def _iterated(t: Trial) -> tuple[bool | None, str]:
    one_step = t.sweep[-1]
    told = _percent("PGD-20 {}, FGSM {}", t.iterated, one_step)
    return t.iterated <= one_step + t.near, told


def _transfer(t: Trial) -> tuple[bool | None, str]:
    if not t.transfer:
        return None, "needs a source"
    told = _percent("white box {}, transfer {}", t.white, t.transfer[0])
    return t.white <= t.transfer[0] + t.near, told


def _black_box(t: Trial) -> tuple[bool | None, str]:
    if not t.has_gradient:
        told = "needs a gradient"
        if t.square is None:
            return None, told
        return None, _percent("Square, 1,000 queries, {}; to compare it ", t.square) + told
    # Square takes long, and where nothing is left it can find nothing.
    if t.white <= t.near:
        return True, _percent("white box {}, nothing is left to break", t.white)
    if t.square is None:
        return None, "answers at random" if t.random else "needs the extra audit"
    told = _percent("Square, 1,000 queries, {}, white box {}", t.square, t.white)
    return t.square >= t.white - t.near, told


def _falls_to_zero(t: Trial) -> tuple[bool | None, str]:
    return t.huge <= t.near, _percent("PGD-20 at eps 0.5: {}", t.huge)


def _converges(t: Trial) -> tuple[bool | None, str]:
    told = _percent("20 steps {}, 100 steps x 2 {}", t.iterated, t.converged)
    return t.interval(max(0, t.iterated - t.converged))[0] <= LITTLE, told


def _noise(t: Trial) -> tuple[bool | None, str]:
    told = _percent("clean {}, noise {}", t.clean, t.noise)
    return t.clean - t.noise <= (t.clean - t.white) / 4 + t.near, told


def _never_above_clean(t: Trial) -> tuple[bool | None, str]:
    found = [t.noise, *t.transfer]
    if t.has_gradient:
        found += [t.iterated, t.converged, *t.sweep]
    best = max(found)
    told = _percent("clean {}, best under attack {}", t.clean, best)
    return best <= t.clean + t.near, told


def _gradients(t: Trial) -> tuple[bool | None, str]:
    lengths = input_gradient(t.model, t.images, t.labels).flatten(1).norm(dim=1)
    flat, middle = float((lengths < 1e-12).float().mean()), float(lengths.median())
    told = f"median length {middle:.2g}, all but 0 for {100 * flat:.1f} %"
    if flat <= t.near and 1e-6 < middle < 1e6:
        return True, told
    return False, told + '; try another loss (pgd\'s loss="margin"), then BPDA'


def _steadily(t: Trial) -> tuple[bool | None, str]:
    rise = max(later - earlier for earlier, later in pairwise([t.clean, *t.sweep]))
    return rise <= t.near, _percent("FGSM at 1/4, 1/2, 3/4, 1 eps: {}, {}, {}, {}", *t.sweep)


def _tiny_step(t: Trial) -> tuple[bool | None, str]:
    """Compare what the gradient promises for a tiny step with what the step does.

    Right is from half to twice the promise. None of the 24 shipped models broke it for one of 100
    images, the most curved kept 0.68 of it; k-winners (Xiao et al. 2020, 1905.10510), JPEG behind a
    made-up derivative and random inputs break it for most.
    """
    margins = attack_loss(predict(t.model, t.images), t.labels, "margin").abs()
    model = Rescaled(t.model, float(margins.median()) or 1.0)
    middle = t.images.detach().float().clamp(TINY, 1 - TINY)  # no step leaves [0, 1]
    gradient = input_gradient(model, middle, t.labels)
    step = TINY * gradient.sign()
    ends = (predict(model, middle + side).cpu().double() for side in (step, -step))
    up, down = (F.cross_entropy(logits, t.labels.cpu(), reduction="none") for logits in ends)
    done, promised = up - down, 2 * TINY * gradient.cpu().abs().flatten(1).sum(1)
    most = done.abs().maximum(promised)
    wrong = float(((done - promised).abs() > most / 2 + 1e-5).float().mean())
    told = _percent("wrong by half or more for {} of the images", wrong)
    return t.interval(wrong)[0] <= LITTLE, told


def _no_scale(t: Trial) -> tuple[bool | None, str]:
    told = _percent("PGD-20 on cross entropy {}, on the margin {}", t.iterated, t.on_margin)
    return t.interval(t.iterated)[0] <= t.interval(t.on_margin)[1], told


def _known_classes(t: Trial) -> tuple[bool | None, str]:
    if t.classes is None:
        return None, "needs the number of classes"
    shown = (t.images, t.walked) if t.has_gradient else (t.images,)
    other = [float((predict(t.model, x).argmax(1) >= t.classes).float().mean()) for x in shown]
    told = _percent("no class is the answer to {} of clean images", other[0])
    if t.has_gradient:
        told += _percent(", {} under PGD-20", other[1])
    return t.interval(max(other))[0] <= LITTLE, told


def _claimed(t: Trial) -> tuple[bool | None, str]:
    if t.claim is None:
        return None, "needs a claim"
    told = _percent("claimed {}, worst attack found {}", t.claim, t.worst)
    return t.interval(t.worst)[1] >= t.claim, told


CHECKLIST: tuple[tuple[str, Callable[[Trial], tuple[bool | None, str]]], ...] = (
    ("clean accuracy is above chance", _above_chance),
    ("the same answer to the same image", _same_answer),
    ("a gradient leads from the answers to the pixels", _leads_back),
    ("iterated attack at least as strong as one step", _iterated),
    ("white box at least as strong as transfer", _transfer),
    ("black box weaker than white box", _black_box),
    ("accuracy falls to 0 as eps grows", _falls_to_zero),
    ("more steps and restarts change little", _converges),
    ("noise of the same size does little", _noise),
    ("never more accurate than on clean images", _never_above_clean),
    ("gradients neither vanish nor explode", _gradients),
    ("accuracy falls steadily along the attack", _steadily),
    ("a tiny step does what the gradient says", _tiny_step),
    ("the loss hides nothing that the margin shows", _no_scale),
    ("every answer is a class of the data", _known_classes),
    ("the worst attack leaves what is claimed", _claimed),
)
WITHOUT_GRADIENT = frozenset(
    {
        _above_chance,
        _same_answer,
        _leads_back,
        _black_box,
        _never_above_clean,
        _known_classes,
        _claimed,
    }
)


def audit(model: Classifier, images: Tensor, labels: Tensor, **options: Any) -> pd.DataFrame:
    """Run the checklist on a model: arguments as of `Trial`, a table as of `Trial.checklist`."""
    return Trial(model, images, labels, **options).checklist()
