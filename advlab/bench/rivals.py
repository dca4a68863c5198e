"""FGSM and PGD beside torchattacks, foolbox and ART: the same model, images, eps and steps."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from advlab import evaluation
from advlab.attacks import fgsm, pgd
from advlab.bench.ceiling import highest_rate
from advlab.bench.measure import Row, Way, check_equal, side_by_side, to_rows
from advlab.data import ImageData, Split

EPS = 8 / 255
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Library:
    """An attack library: how it makes FGSM and PGD images of one model."""

    fgsm: Attack
    pgd: Attack


def libraries(model: nn.Module, alpha: float, steps: int) -> dict[str, Library]:
    """Return those of torchattacks, foolbox and ART that are installed, set up for `model`."""
    found = {}
    for name, make in (("torchattacks", _torchattacks), ("foolbox", _foolbox), ("ART", _art)):
        with suppress(ImportError):
            found[name] = make(model, alpha, steps)
    return found


def _torchattacks(model: nn.Module, alpha: float, steps: int) -> Library:
    import torchattacks

    iterated = torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=steps, random_start=False)
    return Library(torchattacks.FGSM(model, eps=EPS), iterated)


def _foolbox(model: nn.Module, alpha: float, steps: int) -> Library:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    single = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    iterated = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
    return Library(*(partial(attack.run, wrapped, epsilon=EPS) for attack in (single, iterated)))


def _art(model: nn.Module, alpha: float, steps: int) -> Library:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    @cache
    def wrapped(*shape: int) -> PyTorchClassifier:
        classes = model(torch.zeros(1, *shape)).shape[1]
        options = {"clip_values": (0, 1), "device_type": "cpu"}
        return PyTorchClassifier(model, nn.CrossEntropyLoss(), shape, classes, **options)

    def attack(images: Tensor, labels: Tensor, kind: type, **options: Any) -> Tensor:
        options |= {"norm": "inf", "eps": EPS, "batch_size": len(images)}
        made = kind(wrapped(*images.shape[1:]), **options)
        return torch.from_numpy(made.generate(images.numpy(), labels.numpy()))

    iterated: dict[str, Any] = {"eps_step": alpha, "max_iter": steps, "verbose": False}
    return Library(
        partial(attack, kind=FastGradientMethod),
        partial(attack, kind=ProjectedGradientDescentPyTorch, **iterated),
    )


def _beside_the_fastest(
    part: str, what: str, ways: dict[str, Way], rounds: int, target: float
) -> list[Row]:
    """Return rows of which advlab's is compared with the fastest of the others."""
    seconds = side_by_side(ways, rounds)
    others = [name for name in ways if name != "advlab"]
    fastest = min(others, key=lambda name: median(seconds[name]), default="")
    ours, *theirs = to_rows(part, what, ways, seconds, against=fastest)
    theirs = [replace(row, against="", ratio=math.nan) for row in theirs]
    return [replace(ours, target=target), *theirs]


def fgsm_part(images: ImageData, model: nn.Module, rounds: int) -> list[Row]:
    """Measure FGSM at 1, 10, 100 and 1,000 images beside the other libraries, in float32.

    Raises:
        RuntimeError: if a library makes other images than advlab does.
    """
    rows, limit = [], highest_rate(model, images.shape, "craft")
    attacks: dict[str, Attack] = {"advlab": partial(fgsm, model, eps=EPS)}
    attacks |= {name: library.fgsm for name, library in libraries(model, EPS / 4, 20).items()}
    for n in (size for size in (1, 10, 100, 1_000) if size <= len(images.test)):
        batch = images.test.first(n).batch(slice(None))
        ours, ways = attacks["advlab"](*batch), {}
        for name, attack in attacks.items():
            check_equal(f"{name}'s FGSM", attack(*batch), ours)
            ways[name] = Way(partial(attack, *batch), n, limit, times=max(1, 300 // n))
        what = f"{n:,} image{'s' if n > 1 else ''}"
        rows += _beside_the_fastest("FGSM against libraries", what, ways, 2 * rounds, 1.0)
    return rows


def pgd_part(
    images: ImageData,
    networks: Mapping[str, tuple[nn.Module, float]],
    rounds: int,
    n: int = 100,
) -> list[Row]:
    """Measure PGD-20 (no random start, alpha = eps / 4, eps = 8/255) beside the other libraries.

    Args:
        images: Data; the first `n` test images are attacked for the time, the first 1,000 to
            compare how many hold.
        networks: By name, the model and the target ratio.
        rounds: As in `side_by_side`.
        n: Images of one call.

    Raises:
        RuntimeError: if a library breaks more images than advlab does.
    """
    options: dict[str, Any] = {"alpha": EPS / 4, "steps": 20}
    rows = []
    compared = images.test.first(min(1_000, len(images.test)))
    for name, (model, target) in networks.items():
        attacks: dict[str, Attack] = {
            "advlab": partial(pgd, model, eps=EPS, random_start=False, **options)
        }
        attacks |= {way: library.pgd for way, library in libraries(model, **options).items()}
        left = {way: _held(model, attack, compared, n) for way, attack in attacks.items()}
        stronger = [way for way in left if left[way] < left["advlab"]]
        if stronger:
            raise RuntimeError(f"{stronger[0]}'s PGD is stronger than advlab's: {left}")
        # As if all steps were taken for every image.
        limit = highest_rate(model, images.shape, "craft") / options["steps"]
        clean, _ = evaluation.evaluate(model, *compared.batch(slice(None)))
        ways = {
            way: Way(
                partial(attack, *images.test.batch(slice(0, n))), n, limit,
                note=f"of {len(compared):,} images {clean} are right on clean images, "
                f"{left[way]} under attack",
            )
            for way, attack in attacks.items()
        }  # fmt: skip
        what = f"{name}, {n} images"
        rows += _beside_the_fastest("PGD-20 against libraries", what, ways, rounds, target)
    return rows


def _held(model: nn.Module, attack: Attack, split: Split, size: int) -> int:
    """Return how many images of `split` hold, attacked `size` at a time."""
    parts = [split.batch(slice(k, k + size)) for k in range(0, len(split), size)]
    return sum(evaluation.evaluate(model, attack(x, y), y)[0] for x, y in parts)
