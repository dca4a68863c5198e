"""FGSM and PGD beside torchattacks, foolbox and ART: the same model, images, eps and steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advlab import evaluation
from advlab.attacks import fgsm, pgd
from advlab.data import ImageData, Split
from advlab.tools.measure import Ceilings, Row, check_equal, rate_rows, side_by_side

EPS = 8 / 255


@dataclass(frozen=True)
class Library:
    """An attack library: how it makes FGSM and PGD images of `model`."""

    name: str
    fgsm: Callable[[Tensor, Tensor], Tensor]
    pgd: Callable[[Tensor, Tensor], Tensor]


def libraries(model: nn.Module, alpha: float, steps: int) -> list[Library]:
    """Return those of torchattacks, foolbox and ART that are installed, set up for `model`."""
    found = []
    for make in (_torchattacks, _foolbox, _art):
        try:
            found.append(make(model, alpha, steps))
        except ImportError:
            continue
    return found


def _torchattacks(model: nn.Module, alpha: float, steps: int) -> Library:
    import torchattacks

    iterated = torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=steps, random_start=False)
    return Library("torchattacks", torchattacks.FGSM(model, eps=EPS), iterated)


def _foolbox(model: nn.Module, alpha: float, steps: int) -> Library:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    single = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    iterated = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
    return Library(
        "foolbox",
        lambda images, labels: single.run(wrapped, images, labels, epsilon=EPS),
        lambda images, labels: iterated.run(wrapped, images, labels, epsilon=EPS),
    )


def _art(model: nn.Module, alpha: float, steps: int) -> Library:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=model(torch.zeros(1, 3, 32, 32)).shape[1],
        clip_values=(0, 1),
        device_type="cpu",
    )

    def attack(kind: type, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        made = kind(wrapped, norm="inf", eps=EPS, batch_size=len(images), **options)
        return torch.from_numpy(made.generate(images.numpy(), labels.numpy()))

    iterated = {"eps_step": alpha, "max_iter": steps, "verbose": False}
    return Library(
        "ART",
        lambda images, labels: attack(FastGradientMethod, images, labels),
        lambda images, labels: attack(ProjectedGradientDescentPyTorch, images, labels, **iterated),
    )


def fgsm_part(images: ImageData, model: nn.Module, ceilings: Ceilings, rounds: int) -> list[Row]:
    """Measure FGSM at 1, 10, 100 and 1,000 images beside the other libraries, in float32."""
    rows = []
    for n in (size for size in (1, 10, 100, 1_000) if size <= len(images.test)):
        batch = images.test.first(n).batch(slice(None))
        ours = fgsm(model, *batch, EPS)
        repeats = max(1, 50 // n)
        ways: dict[str, Callable[[], Any]] = {"advlab": partial(fgsm, model, *batch, EPS)}
        for library in libraries(model, EPS / 4, 20):
            check_equal(f"{library.name}'s FGSM", library.fgsm(*batch), ours)
            ways[library.name] = partial(library.fgsm, *batch)
        repeated = {name: partial(_repeat, way, repeats) for name, way in ways.items()}
        rows += _beside_the_fastest(
            "FGSM against libraries",
            f"{n:,} image{'s' if n > 1 else ''}",
            side_by_side(repeated, 2 * rounds),
            n * repeats,
            1.0,
            ceilings.images_per_second(model, "craft", 64, "float32"),
        )
    return rows


def _repeat(way: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        way()


def _beside_the_fastest(
    part: str,
    what: str,
    seconds: dict[str, Any],
    amount: float,
    target: float,
    limit: float,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Return rows of which advlab's is compared with the fastest of the others."""
    others = [name for name in seconds if name != "advlab"]
    fastest = min(others, key=lambda name: seconds[name].median, default="")
    rows = rate_rows(
        part,
        what,
        seconds,
        dict.fromkeys(seconds, float(amount)),
        "images/s",
        against=fastest,
        ceilings=dict.fromkeys(seconds, limit),
        targets={"advlab": target},
        notes=notes,
    )
    return [row if row.way == "advlab" else replace(row, against="", ratio=None) for row in rows]


def pgd_part(
    images: ImageData,
    networks: dict[str, tuple[nn.Module, float]],
    ceilings: Ceilings,
    rounds: int,
    n: int = 100,
) -> list[Row]:
    """Measure PGD-20 (no random start, alpha = eps / 4, eps = 8/255) beside the other libraries.

    Args:
        images: Data; the first `n` test images are attacked for the time, the first 1,000 to
            compare how many hold.
        networks: By name, the model and the target ratio.
        ceilings: For the fraction of the convolutions' rate, as if all 20 steps were taken.
        rounds: As in `side_by_side`.
        n: Images of one call.

    Raises:
        RuntimeError: if a library breaks more images than advlab does.
    """
    steps, rows = 20, []
    options = {"alpha": EPS / 4, "steps": steps, "random_start": False}
    batch = images.test.batch(slice(0, n))
    compared = images.test.first(min(1_000, len(images.test)))
    for name, (model, target) in networks.items():
        attacks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "advlab": partial(pgd, model, eps=EPS, **options)
        }
        attacks |= {library.name: library.pgd for library in libraries(model, EPS / 4, steps)}
        left = {way: _held(model, attack, compared, n) for way, attack in attacks.items()}
        for way in left:
            if left["advlab"] > left[way]:
                raise RuntimeError(f"{way}'s PGD is stronger than advlab's: {left}")
        limit = ceilings.images_per_second(model, "craft", 64, "float32") / steps
        clean = evaluation.evaluate(model, *compared.batch(slice(None)))[0]
        ways = {way: partial(attack, *batch) for way, attack in attacks.items()}
        rows += _beside_the_fastest(
            "PGD-20 against libraries",
            f"{name}, {n} images",
            side_by_side(ways, rounds),
            n,
            target,
            limit,
            {
                way: f"of {len(compared):,} images {clean} are right on clean images, "
                f"{left[way]} under attack"
                for way in ways
            },
        )
    return rows


def _held(
    model: nn.Module, attack: Callable[[Tensor, Tensor], Tensor], split: Split, size: int
) -> int:
    """Return how many images of `split` hold, attacked `size` at a time."""
    parts = [split.batch(slice(k, k + size)) for k in range(0, len(split), size)]
    return sum(evaluation.evaluate(model, attack(x, y), y)[0] for x, y in parts)
