"""Score a submission to the open challenge of lesson 08: an attack, or a defence of Shapes-10.

An **attack** is a safetensors file with `images` (attacked versions of the first test images,
float32 in [0, 1] or uint8) and `labels`. A **defence** is a file of weights of the CNN, trained on
Shapes-10. Everything is computed again here; nothing that a file claims is believed.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from advlab import datasets, evaluation, files, lab
from advlab.attacks import attack_loss, pgd
from advlab.catalogue import ATTACKS
from advlab.checkpoints import CheckpointError, is_safetensors, load_weights, read_tensors
from advlab.data import to_float

EPS = 8 / 255
ATTACKED = 1_000  # test images of an attack, fewer where the data set has fewer
DEFENDED = 500  # test images of Shapes-10 by which a defence is scored


class SubmissionError(ValueError):
    """A submission that is refused; the message says why and what to do."""


def read_attack(path: Path) -> tuple[Tensor, Tensor] | None:
    """Return images and labels of an attack's file; None if it is no such file.

    Raises:
        SubmissionError: if the file is damaged or only one of the two is in it.
    """
    if not is_safetensors(path):
        return None
    try:
        found = read_tensors(path)
    except CheckpointError as error:
        raise SubmissionError(str(error)) from error
    named = {"images", "labels"} & set(found)
    if not named:
        return None
    if len(named) == 1 or len(found) != 2:
        raise SubmissionError(
            f"{path} holds {', '.join(sorted(found))}; an attack holds images and labels, no more"
        )
    return found["images"], found["labels"]


def check_attack(images: Tensor, labels: Tensor, originals: Tensor, true: Tensor) -> Tensor:
    """Return the attacked images as float32, if they keep the rules.

    Args:
        images: The submission: (N, 3, 32, 32), float32 in [0, 1] or uint8.
        labels: The submission's, (N,) int64.
        originals: (N, 3, 32, 32) uint8.
        true: (N,) int64.

    Raises:
        SubmissionError: for a wrong length, shape or dtype, changed labels, NaN, values out of
            range, pixels moved by more than eps, or values that do not survive 8-bit saving.
    """
    if images.shape != originals.shape:
        raise SubmissionError(
            f"images have shape {tuple(images.shape)}; it must be {tuple(originals.shape)}, all "
            "of the first test images in their order"
        )
    if labels.dtype != torch.int64:
        raise SubmissionError(f"labels are {labels.dtype}; give int64, as the test set's are")
    if labels.shape != true.shape or not torch.equal(labels, true):
        changed = int((labels != true).sum()) if labels.shape == true.shape else "all"
        raise SubmissionError(
            f"labels are not the test set's ({changed} differ); submit them as they are"
        )
    if images.dtype == torch.uint8:
        images = to_float(images)
    if images.dtype != torch.float32:
        raise SubmissionError(f"images are {images.dtype}; give float32 in [0, 1], or uint8")
    if not images.isfinite().all():
        count = int((~images.isfinite()).flatten(1).any(1).sum())
        raise SubmissionError(f"{count} images hold NaN or infinity")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise SubmissionError(f"images range from {low:.4g} to {high:.4g}; they must be in [0, 1]")
    steps = 255 * images
    if float((steps - steps.round()).abs().max()) > 1e-3:
        raise SubmissionError(
            "some pixels are no whole steps of 1/255 and would change when saved as a picture; "
            "round them yourself: (images * 255).round() / 255"
        )
    moved = (steps.round() - originals.float()).abs().flatten(1).amax(1)
    over = int((moved > round(255 * EPS)).sum())
    if over:
        raise SubmissionError(
            f"{over} images are moved by more than eps = {round(255 * EPS)}/255 "
            f"(up to {int(moved.max())}/255)"
        )
    return images


def score_attack(
    images: Tensor, labels: Tensor, dataset: str, data_dir: str
) -> tuple[str, int, int, int]:
    """Count the images that the robust CNN still gets right; results as in `score_defence`."""
    lesson = lab.start("lesson", dataset, data_dir=data_dir, device="cpu")
    test = lesson.data.test.first(min(ATTACKED, len(lesson.data.test)))
    shown = check_attack(images, labels, test.images, test.labels)
    target = lesson.zoo.get("cnn", lesson.settings.adversarial["robust"]).model
    reference = ATTACKS["pgd-20"](target, *test.batch(slice(None)), EPS)
    reference = (255 * reference).round() / 255  # as every submission
    ours, theirs = (int(evaluation.holds(target, x, test.labels).sum()) for x in (reference, shown))
    return lesson.data.name, theirs, ours, len(test)


def score_defence(path: Path) -> tuple[str, int, int, int]:
    """Count the Shapes-10 images that a defence gets right under all of three PGD attacks.

    Returns:
        The data; how many images hold, and how many of them with the reference; of how many.
    """
    try:
        checkpoint = load_weights(path, "cnn")
    except CheckpointError as error:
        raise SubmissionError(str(error)) from error
    test = datasets.Shapes10(1, DEFENDED).test
    batch = test.batch(slice(None))
    _check_gradients(checkpoint.model, *batch)
    lesson = lab.start("lesson", "shapes10", device="cpu")
    reference = lesson.zoo.get("cnn", lesson.settings.adversarial["robust"])
    theirs, ours = (_worst_case(c.model, *batch) for c in (checkpoint, reference))
    return "Shapes-10", theirs, ours, len(test)


def _check_gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    """Refuse a network whose gradients PGD cannot follow: what it leaves would be no worst case.

    Weights of extreme size change no answer and make gradients smaller than float32 can hold.
    """
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attack_loss(model(x), labels, "margin").sum(), x)
    blind = int(((gradient == 0).flatten(1).float().mean(1) > 0.5).sum())
    if blind:
        raise SubmissionError(
            f"for {blind} of {len(images)} images the gradient is 0 in more than half of the "
            "pixels, so PGD cannot attack this network and its score would mean nothing; submit "
            "weights of ordinary size, of a network whose answers depend on the image"
        )


def _worst_case(model: torch.nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the images that hold under PGD with each of its losses: one alone could be masked."""
    held = evaluation.holds(model, images, labels)
    for loss in ("ce", "dlr", "margin"):
        made = pgd(model, images, labels, EPS, alpha=EPS / 8, steps=20, restarts=2, loss=loss)
        held &= evaluation.holds(model, made, labels)
    return int(held.sum())


def score(path: Path, *, dataset: str = "auto", data_dir: str = "auto") -> dict[str, Any]:
    """Check and score a submission; append it to outputs/challenge/leaderboard.csv.

    Args:
        path: An attack or a defence (see above).
        dataset, data_dir: Of an attack, as in `lab.start`.

    Returns:
        Its row: file, kind, data, accuracy with its interval, the reference's accuracy (PGD-20, or
        our own defence), better, correct, n, sha256, scored.

    Raises:
        SubmissionError: if it is refused.
    """
    if not path.is_file():
        raise SubmissionError(f"there is no file {path}")
    attack = read_attack(path)
    found = score_attack(*attack, dataset, data_dir) if attack else score_defence(path)
    name, correct, reference, n = found
    low, high = evaluation.wilson(correct, n)
    row = {
        "file": path.name,
        "kind": "attack" if attack else "defence",
        "data": name,
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "reference": reference / n,
        "better": correct < reference if attack else correct > reference,
        "correct": correct,
        "n": n,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "scored": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    board = files.home() / "outputs" / "challenge" / "leaderboard.csv"
    rows = pd.DataFrame([row])
    if board.is_file():
        rows = pd.concat([pd.read_csv(board), rows], ignore_index=True)
    files.write_table(board, rows)
    return row
