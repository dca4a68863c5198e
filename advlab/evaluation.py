"""Accuracy under attack, as tidy tables: one row a measurement.

Everything is computed in float32 and eval mode. Counts are exact (correct images out of n, never an
average of batch averages), each with its 95 % Wilson interval. A cell that was measured once is
kept on disk under a hash of everything that it depends on, so no lesson computes it again.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab import files
from advlab.attacks import CHUNK, check_eps, check_logits, eval_mode, fgsm_direction, perturb
from advlab.checkpoints import Checkpoint
from advlab.data import ImageData, check_batch
from advlab.models import fastest_layout
from advlab.training import progress_bar

# "fgsm": the gradient with running statistics (eval mode), as every attack library takes it;
# "fgsm-per-image": with each image's own statistics, as the paper's tables;
# "noise": a random sign per pixel, the control of the same size.
ATTACKS = ("fgsm", "fgsm-per-image", "noise")
WHITE_BOX = "white box"


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion.

    Args:
        correct: Successes.
        n: Trials, at least 1.

    Returns:
        (low, high), fractions.

    Raises:
        ValueError: if not 0 <= correct <= n, or n is 0.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}; need n >= 1 and 0 <= correct <= n")
    z = 1.959964
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of float images (N, 3, 32, 32) in [0, 1], computed in eval mode, float32.

    Returns:
        (N, outputs) float32; the model's mode is left as it was.
    """
    with eval_mode(model), torch.autocast(images.device.type, enabled=False):
        parts = [
            model(part.contiguous(memory_format=fastest_layout(model))).float()
            for part in images.split(CHUNK)
        ]
    return torch.cat(parts)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, float]:
    """Return (number of correct images, mean cross entropy) of `model`.

    Args:
        model: Maps images to logits.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64.

    Raises:
        ValueError, TypeError: if images, labels or logits are not as above.
    """
    check_batch(images, labels)
    logits = check_logits(predict(model, images), labels)
    loss = float(F.cross_entropy(logits.double(), labels))
    return int((logits.argmax(1) == labels).sum()), loss


def confusion(labels: Tensor, predictions: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """Return counts: a row per true class, a column per predicted class.

    Args:
        labels, predictions: (N,) int64, both below the number of classes.
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
    return pd.DataFrame(counts.numpy(), index=names[0], columns=names[1])


def attack_direction(
    attack: str, source: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0
) -> Tensor:
    """Return the int8 direction in which `attack` moves `images`.

    Args:
        attack: One of `ATTACKS`.
        source: The model whose gradient is used; "noise" uses none.
        images, labels: What to attack.
        seed: Of the noise.

    Raises:
        ValueError: if there is no such attack.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; choose one of {', '.join(ATTACKS)}")
    if attack == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, images.shape, generator=generator, dtype=torch.int8) * 2 - 1
    per_image = attack == "fgsm-per-image"
    return fgsm_direction(source, images, labels, per_image_statistics=per_image)


def _identity(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return what computes the same logits: weights alone would mix up the LSTM's two readings."""
    return checkpoint.metadata["arch"], checkpoint.metadata["weights_hash"]


def _read_cell(path: Path) -> tuple[int, float] | None:
    """Return (correct, loss) of a measured cell; None if there is none or it is damaged."""
    try:
        correct, loss = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return int(correct), float(loss)


def name_of(checkpoint: Checkpoint) -> str:
    """Return a short name such as "cnn baseline" or "cnn-lstm eps=0.2"; the file's for foreign."""
    eps = checkpoint.metadata["train_eps"]
    if eps is None:
        return checkpoint.path.stem
    return f"{checkpoint.metadata['arch']} {f'eps={eps:g}' if eps else 'baseline'}"


def accuracy_table(
    targets: Sequence[Checkpoint],
    data: ImageData,
    test_eps: Sequence[float],
    *,
    attack: str = "fgsm",
    source: Checkpoint | None = None,
    seed: int = 0,
    cells: Path | None = None,
    progress: str | None = None,
) -> pd.DataFrame:
    """Measure every target on the test images attacked with every eps.

    Args:
        targets: The models that are attacked.
        data: The data set; all of its test images are used.
        test_eps: Sizes of the attack, from 0 to 1.
        attack: One of `ATTACKS`.
        source: The model whose gradient makes the attacked images, shown to every target
            (transfer). None: each target's own gradient (white box).
        seed: Of the noise.
        cells: Folder where measured cells are kept; None keeps none.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        One row per (target, eps): model, architecture, train_eps, test_eps, attack, source, data,
        recipe, seed, accuracy, low, high (95 % Wilson interval), loss (mean cross entropy), correct
        and n.

    Raises:
        ValueError: if an eps or the attack is out of range.
    """
    for eps in test_eps:
        check_eps(eps)
    test = data.test
    images, labels = test.batch(slice(None))
    directions: dict[tuple[str, str], Tensor] = {}

    def measure(target: Checkpoint, maker: Checkpoint, eps: float) -> tuple[int, float]:
        if eps == 0:
            return evaluate(target.model, images, labels)
        made_by = _identity(maker)
        if made_by not in directions:
            directions.clear()
            directions[made_by] = attack_direction(attack, maker.model, images, labels, seed=seed)
        attacked = perturb(images, directions[made_by], eps)
        return evaluate(target.model, attacked, labels)

    rows = []
    pairs = [(target, source or target, eps) for target in targets for eps in test_eps]
    bar = progress_bar(progress, len(pairs), "cell")
    for target, maker, eps in pairs:
        how = None
        if eps:
            how = [attack, seed] if attack == "noise" else [attack, *_identity(maker)]
        identity = ["v2", *_identity(target), how, float(eps), data.test_md5, len(test)]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        path = cells / key[:2] / f"{key}.json" if cells else None
        found = _read_cell(path) if path else None
        correct, loss = found or measure(target, maker, eps)
        if path and not found:
            files.write_bytes(path, json.dumps([correct, loss]).encode())
        bar.update()
        low, high = wilson(correct, len(test))
        rows.append(
            {
                "model": name_of(target),
                "architecture": target.metadata["arch"],
                "train_eps": target.metadata["train_eps"],
                "test_eps": float(eps),
                "attack": attack,
                "source": name_of(source) if source else WHITE_BOX,
                "data": data.name,
                "recipe": target.metadata["recipe"]["name"],
                "seed": target.metadata["seed"],
                "accuracy": correct / len(test),
                "low": low,
                "high": high,
                "loss": loss,
                "correct": correct,
                "n": len(test),
            }
        )
    bar.close()
    return pd.DataFrame(rows)
