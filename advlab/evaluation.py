"""Accuracy under attack, as tidy tables: one row a measurement.

Everything is computed in float32 and eval mode. Counts are exact (correct images out of n, never an
average of batch averages), each with its 95 % Wilson interval. What was measured once is kept in a
`Store`, so no lesson computes it again.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from advlab.attacks import check_eps, perturb
from advlab.catalogue import ATTACKS, Attack, attack_named
from advlab.checkpoints import Checkpoint
from advlab.data import ImageData, check_batch, check_integer
from advlab.forward import Classifier, evaluate, holds
from advlab.forward import predict as predict  # lessons find all that they ask a model here
from advlab.machine import progress_bar
from advlab.store import Store, key

WHITE_BOX = "white box"


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return (low, high), fractions: the 95 % Wilson interval of `correct` successes in `n` trials.

    Raises:
        ValueError: if not 0 <= correct <= n, or n is 0.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}; need n >= 1 and 0 <= correct <= n")
    z = 1.959964
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is p itself, and rounding must not put it on the other side.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def confusion(labels: Tensor, predictions: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """Return counts: a row per true class, a column per predicted class.

    Args:
        labels, predictions: (N,) int64.
        classes: Names.

    Raises:
        ValueError: if a label or prediction has no name (the CNN has 64 logits for ten classes).
    """
    k = len(classes)
    highest = int(torch.maximum(labels, predictions).max())
    if highest >= k:
        raise ValueError(
            f"class {highest} has no name, there are {k}; leave such predictions out, or take the "
            f"argmax over the first {k} logits"
        )
    counts = torch.bincount(labels * k + predictions, minlength=k * k).reshape(k, k)
    names = pd.Index(classes, name="true"), pd.Index(classes, name="predicted")
    return pd.DataFrame(counts.cpu().numpy(), index=names[0], columns=names[1])


def result_row(
    target: Checkpoint,
    data_name: str,
    test_eps: float,
    attack: str,
    source: str,
    found: tuple[int, float],
    n: int,
) -> dict[str, Any]:
    """Return a row of `accuracy_table`: what was measured, on what, and its 95 % interval.

    `found` are the correct images of `n`, and the mean cross entropy (NaN where not computed).
    """
    correct, loss = found
    low, high = wilson(correct, n)
    return {
        "model": target.name,
        "architecture": target.arch,
        "train_eps": target.metadata["train_eps"],
        "test_eps": float(test_eps),
        "attack": attack,
        "source": source,
        "data": data_name,
        "recipe": target.metadata["recipe"]["name"],
        "seed": target.metadata["seed"],
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "loss": loss,
        "correct": correct,
        "n": n,
    }


class _Bench:
    """Measures models on the test images under one attack; a direction is crafted once a source."""

    def __init__(self, data: ImageData, attack: Attack, seed: int, store: Store) -> None:
        self.data, self.attack, self.seed, self.store = data, attack, seed, store
        self.images, self.labels = data.test.batch(slice(None))
        self._direction: tuple[Any, Tensor] | None = None

    def measure(self, target: Checkpoint, source: Checkpoint, eps: float) -> tuple[int, float]:
        """Return (correct, loss) of `target`, from the store where it was measured before."""
        how = None
        if eps:
            # What has no random start is the same for every seed, what has no gradient for every
            # source.
            how = [self.attack.name, self.seed if self.attack.random else None]
            how += _identity(source) if self.attack.gradient else ()
        on = [self.data.test_md5, len(self.labels), self.images.device.type]
        name = key("measurement", _identity(target), how, float(eps), on)
        correct, loss = self.store.remember(
            name, lambda: evaluate(target.model, self._attacked(source, eps), self.labels)
        )
        return int(correct), float(loss)

    def _attacked(self, source: Checkpoint, eps: float) -> Tensor:
        batch = self.images, self.labels
        if eps == 0 or not self.attack.one_direction:
            return self.attack(source.model, *batch, eps, seed=self.seed)
        made_by = _identity(source)
        if self._direction is None or self._direction[0] != made_by:
            self._direction = None  # gone before the next one comes
            found = self.attack.direction(source.model, *batch, seed=self.seed)
            self._direction = made_by, found
        return perturb(self.images, self._direction[1], eps)


def _identity(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return what computes the same logits: weights alone would mix up the LSTM's two readings."""
    return checkpoint.arch, checkpoint.metadata["weights_hash"]


def accuracy_table(
    targets: Sequence[Checkpoint],
    data: ImageData,
    test_eps: Sequence[float],
    *,
    attack: str = "fgsm",
    source: Checkpoint | None = None,
    seed: int = 0,
    store: Store | None = None,
    progress: str | None = None,
) -> pd.DataFrame:
    """Measure every target on the test images attacked with every eps.

    Args:
        targets: The models that are attacked.
        data: The data set; all of its test images are used.
        test_eps: Sizes of the attack, from 0 to 1.
        attack: One of `catalogue.ATTACKS`.
        source: The model whose gradient makes the attacked images, shown to every target
            (transfer). None: each target's own gradient (white box).
        seed: Of noise and random starts.
        store: Where what was measured is kept; None keeps nothing, and nothing is kept of an attack
            whose code is not of this package.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        One row per (target, eps): model, architecture, train_eps, test_eps, attack, source, data,
        recipe, seed, accuracy, low, high (95 % Wilson interval), loss (mean cross entropy), correct
        and n.

    Raises:
        ValueError: if an eps is out of range, there is no such attack, or two targets have one
            name.
    """
    for eps in test_eps:
        check_eps(eps)
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two targets are called {', '.join(twice)}, and a table could not tell them apart; "
            "rename a file, or measure them one by one"
        )
    chosen = attack_named(attack)
    kept = store if store and chosen.is_ours else Store(None)
    bench = _Bench(data, chosen, seed, kept)
    made_on = source.name if source else WHITE_BOX
    rows = []
    with progress_bar(progress, len(targets) * len(test_eps), "measurement") as bar:
        for target in targets:
            for eps in test_eps:
                found = bench.measure(target, source or target, eps)
                n = len(data.test)
                rows.append(result_row(target, data.name, eps, attack, made_on, found, n))
                bar.update()
    return pd.DataFrame(rows)


def board(rows: pd.DataFrame, eps: float = 8 / 255) -> pd.DataFrame:
    """Return accuracies at one eps, a row per model and a column per attack, the best model first.

    Args:
        rows: As from `accuracy_table`, white box; those on clean images have the attack "clean".
        eps: The size of the attacks shown.

    Returns:
        Index model; columns clean, the attacks for boards that were measured (each is stronger than
        the one before) and autoattack, sorted by the strongest.

    Raises:
        ValueError: if nothing was measured at `eps`, or a model twice under one attack.
    """
    clean, at_eps = rows["attack"] == "clean", (rows["test_eps"] - eps).abs() < 1e-6
    if not at_eps.any():
        raise ValueError(f"no row has test_eps {eps:g}; there are {sorted(set(rows['test_eps']))}")
    shown = rows[clean | at_eps]
    again = shown[shown.duplicated(["model", "attack"])]
    if len(again):
        raise ValueError(
            f"two rows are of {again['model'].iloc[0]} under {again['attack'].iloc[0]} at eps "
            f"{eps:g}; keep one (a seed, a number of images), or rename a model"
        )
    wide = shown.pivot(index="model", columns="attack", values="accuracy")
    columns = ["clean", *(a.name for a in ATTACKS.values() if a.board), "autoattack"]
    wide = wide[[name for name in columns if name in wide]]
    return wide.sort_values(list(wide.columns[::-1]), ascending=False)


def minimal_eps(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    attack: str = "fgsm",
    largest: int = 255,
    seed: int = 0,
) -> Tensor:
    """Return for each image the smallest eps, in steps of 1/255, at which `attack` succeeds.

    Args:
        model, images, labels: As in `attacks.input_gradient`; the model is attacked white box.
        attack: One of `catalogue.ATTACKS`.
        largest: The last eps that is tried, in steps of 1/255.
        seed: Of noise and random starts.

    Returns:
        (N,) float: 0 for an image that the model gets wrong as it is, inf for one that holds to
        the end.

    Raises:
        ValueError: if `largest` is out of range or there is no such attack.
    """
    if check_integer("largest", largest, 1) > 255:
        raise ValueError(f"largest is {largest}; it counts steps of 1/255, from 1 to 255")
    check_batch(images, labels)
    chosen = attack_named(attack)
    found = torch.full((len(images),), math.inf, dtype=torch.float32, device=images.device)
    active = torch.arange(len(images), device=images.device)
    signs = chosen.direction(model, images, labels, seed=seed) if chosen.one_direction else None
    for step in range(largest + 1):
        eps, x, y = step / 255, images[active], labels[active]
        if signs is not None:
            tried = perturb(x, signs[active], eps)
        else:
            tried = chosen(model, x, y, eps, seed=seed)
        broken = ~holds(model, tried, y)
        found[active[broken]] = eps
        active = active[~broken]
        if len(active) == 0:
            break
    return found
