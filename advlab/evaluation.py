"""Accuracy under attack, as tidy tables: one row a measurement.

Everything is computed in float32 and eval mode. Counts are exact (correct images out of n, never an
average of batch averages), each with its 95 % Wilson interval. A cell that was measured once is
kept on disk under a hash of everything that it depends on, so no lesson computes it again.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab import files
from advlab.attacks import (
    CHUNK,
    check_eps,
    check_logits,
    check_size,
    eval_mode,
    fgsm_direction,
    input_gradient,
    perturb,
    pgd,
    rfgsm,
)
from advlab.checkpoints import Checkpoint, is_adversarial, weights_hash
from advlab.data import ImageData, check_batch
from advlab.models import fastest_layout
from advlab.training import progress_bar

# "fgsm": the gradient with running statistics (eval mode), as every attack library takes it;
# "fgsm-per-image": with each image's own statistics, as the paper's tables;
# "noise": a random sign per pixel, the control of the same size;
# "rfgsm": one step of 1.25 eps from a random start;
# "pgd-20": 20 steps of eps / 8 from a random start;
# "pgd-50x3": 50 steps of eps / 8 from three random starts, on cross entropy, then on the margin for
# the images that hold: on robust models either loss breaks images that the other does not.
DIRECTIONS = ("fgsm", "fgsm-per-image", "noise")
ATTACKS = (*DIRECTIONS, "rfgsm", "pgd-20", "pgd-50x3")
WHITE_BOX = "white box"
# The order of a board's columns: each attack is stronger than the one before.
BOARD = ("clean", "fgsm", "pgd-20", "pgd-50x3", "autoattack")


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
    # At 0 and 1 the bound is p itself, and rounding must not put it on the other side.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


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
        attack: One of `DIRECTIONS`.
        source: The model whose gradient is used; "noise" uses none.
        images, labels: What to attack.
        seed: Of the noise.

    Raises:
        ValueError: if there is no such attack.
    """
    if attack not in DIRECTIONS:
        raise ValueError(f"unknown attack {attack!r}; choose one of {', '.join(DIRECTIONS)}")
    if attack == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, images.shape, generator=generator, dtype=torch.int8) * 2 - 1
    per_image = attack == "fgsm-per-image"
    return fgsm_direction(source, images, labels, per_image_statistics=per_image)


def attacked(
    attack: str, source: nn.Module, images: Tensor, labels: Tensor, eps: float, *, seed: int = 0
) -> Tensor:
    """Return `images` attacked within `eps`.

    Args:
        attack: One of `ATTACKS`.
        source: The model whose gradient is used; "noise" uses none.
        images, labels: What to attack.
        eps: From 0 to 1.
        seed: Of noise and random starts.

    Raises:
        ValueError: if there is no such attack.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; choose one of {', '.join(ATTACKS)}")
    if eps == 0:
        return images
    if attack == "rfgsm":
        return rfgsm(source, images, labels, eps, alpha=1.25 * eps, seed=seed)
    if attack == "pgd-20":
        return pgd(source, images, labels, eps, alpha=eps / 8, steps=20, seed=seed)
    if attack == "pgd-50x3":
        options = {"alpha": eps / 8, "steps": 50, "restarts": 3, "seed": seed}
        made = pgd(source, images, labels, eps, **options)
        left = holds(source, made, labels)
        if left.any():
            made[left] = pgd(source, images[left], labels[left], eps, loss="margin", **options)
        return made
    return perturb(images, attack_direction(attack, source, images, labels, seed=seed), eps)


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
    if is_adversarial(checkpoint.metadata):
        return f"{checkpoint.metadata['arch']} {checkpoint.metadata['recipe']['name']}"
    return f"{checkpoint.metadata['arch']} {f'eps={eps:g}' if eps else 'baseline'}"


def result_row(
    target: Checkpoint,
    data_name: str,
    test_eps: float,
    attack: str,
    source: str,
    correct: int,
    n: int,
    loss: float = math.nan,
) -> dict[str, Any]:
    """Return a row of `accuracy_table`: what was measured, on what, and its 95 % interval."""
    low, high = wilson(correct, n)
    return {
        "model": name_of(target),
        "architecture": target.metadata["arch"],
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
        if attack not in DIRECTIONS:
            made = attacked(attack, maker.model, images, labels, eps, seed=seed)
            return evaluate(target.model, made, labels)
        made_by = _identity(maker)
        if made_by not in directions:
            directions.clear()
            directions[made_by] = attack_direction(attack, maker.model, images, labels, seed=seed)
        return evaluate(target.model, perturb(images, directions[made_by], eps), labels)

    rows = []
    pairs = [(target, source or target, eps) for target in targets for eps in test_eps]
    bar = progress_bar(progress, len(pairs), "cell")
    for target, maker, eps in pairs:
        how = None
        if eps:
            # What has no random start is the same for every seed, what has no gradient for every
            # source.
            how = [attack]
            how += [seed] if attack not in ("fgsm", "fgsm-per-image") else []
            how += _identity(maker) if attack != "noise" else ()
        identity = ["v2", *_identity(target), how, float(eps), data.test_md5, len(test)]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        path = cells / key[:2] / f"{key}.json" if cells else None
        found = _read_cell(path) if path else None
        correct, loss = found or measure(target, maker, eps)
        if path and not found:
            files.write_bytes(path, json.dumps([correct, loss]).encode())
        bar.update()
        made_on = name_of(source) if source else WHITE_BOX
        rows.append(result_row(target, data.name, eps, attack, made_on, correct, len(test), loss))
    bar.close()
    return pd.DataFrame(rows)


def board(rows: pd.DataFrame, eps: float = 8 / 255) -> pd.DataFrame:
    """Return accuracies at one eps, a row per model and a column per attack, the best model first.

    Args:
        rows: As from `accuracy_table`, white box; those on clean images have the attack "clean".
        eps: The size of the attacks shown.

    Returns:
        Index model, columns those of `BOARD` that were measured, sorted by the strongest.

    Raises:
        ValueError: if nothing was measured at `eps`.
    """
    clean, at_eps = rows["attack"] == "clean", (rows["test_eps"] - eps).abs() < 1e-6
    if not at_eps.any():
        raise ValueError(f"no row has test_eps {eps:g}; there are {sorted(set(rows['test_eps']))}")
    wide = rows[clean | at_eps].pivot_table(index="model", columns="attack", values="accuracy")
    wide = wide[[name for name in BOARD if name in wide]]
    return wide.sort_values(list(wide.columns[::-1]), ascending=False)


# --- one image at a time: which ones hold


def holds(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether `model` gets it right, (N,) bool.

    The worst case of several attacks is the `&` of their results: an image counts as held only if
    no attack broke it.

    Raises:
        ValueError, TypeError: if images, labels or logits are not as in `evaluate`.
    """
    check_batch(images, labels)
    return check_logits(predict(model, images), labels).argmax(1) == labels


def minimal_eps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: str = "fgsm",
    largest: int = 255,
    seed: int = 0,
) -> Tensor:
    """Return for each image the smallest eps, in steps of 1/255, at which `attack` succeeds.

    Args:
        model: The attacked model, white box.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        attack: One of `ATTACKS`.
        largest: The last eps that is tried, in steps of 1/255.
        seed: Of noise and random starts.

    Returns:
        (N,) float: 0 for an image that the model gets wrong as it is, inf for one that holds to
        the end.
    """
    if not 1 <= largest <= 255:
        raise ValueError(f"largest is {largest}; it counts steps of 1/255, from 1 to 255")
    found = torch.full((len(images),), math.inf)
    active = torch.arange(len(images))
    direction = None
    if attack in DIRECTIONS:
        direction = attack_direction(attack, model, images, labels, seed=seed)
    for step in range(largest + 1):
        eps = step / 255
        if direction is not None:
            tried = perturb(images[active], direction[active], eps)
        else:
            tried = attacked(attack, model, images[active], labels[active], eps, seed=seed)
        broken = ~holds(model, tried, labels[active])
        found[active[broken]] = eps
        active = active[~broken]
        if len(active) == 0:
            break
    return found


def auto_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float = 8 / 255,
    *,
    attacks: Sequence[str] | None = None,
    norm: str = "linf",
    seed: int = 0,
    queries: int = 5_000,
    folder: Path | None = None,
    progress: str | None = None,
) -> Tensor:
    """Attack with AutoAttack, the field's standard measure (Croce and Hein 2020, 2003.01690).

    Four attacks without parameters to tune, each on the images that hold so far: APGD on cross
    entropy, targeted APGD, targeted FAB, and Square, which uses no gradient. The code is its
    authors' (package pyautoattack). It takes minutes for 100 images of a robust model, so each 100
    images that are done are kept in `folder`, and an interrupted run goes on from there.

    Args:
        model: The attacked model.
        images: (N, 3, 32, 32) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Largest change, as in `attacks.pgd`.
        attacks: Some of "apgd-ce", "apgd-t", "fab-t", "square"; None for all four.
        norm: "linf" or "l2".
        seed: Of every random start.
        queries: How often Square may ask the model, per image; 5,000 is the standard.
        folder: Where finished parts are kept; None keeps none.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        (N,) bool: the images that hold.

    Raises:
        ImportError: without the extra "audit".
        ValueError: if `eps` or `norm` is not as in `attacks.pgd`.
    """
    check_size(eps, norm)
    check_batch(images, labels)
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs another package; install it with: pip install "advlab[audit]"'
        ) from error

    def logits(x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=fastest_layout(model)))

    held = []
    parts = list(zip(images.split(CHUNK), labels.split(CHUNK), strict=True))
    bar = progress_bar(progress, len(images), "image")
    with bar, eval_mode(model):
        for x, y in parts:
            path = (
                folder / f"{_part_key(model, x, y, eps, norm, attacks, seed, queries)}.json"
                if folder
                else None
            )
            found = _read_part(path) if path else None
            if found is None or len(found) != len(y):
                chosen = {"attacks": list(attacks), "version": "custom"} if attacks else {}
                with torch.random.fork_rng(devices=[]):
                    attacker = AutoAttack(
                        logits,
                        norm={"linf": "Linf", "l2": "L2"}[norm],
                        eps=eps,
                        seed=seed,
                        **chosen,
                    )
                    attacker.square.n_queries = queries
                    made, _ = attacker.run_standard_evaluation(x.float(), y, batch_size=CHUNK)
                found = holds(model, made.clamp(0, 1), y)
                if path:
                    files.write_bytes(path, json.dumps(found.tolist()).encode())
            held.append(found)
            bar.update(len(y))
            bar.set_postfix(held=f"{float(torch.cat(held).float().mean()):.3f}")
    return torch.cat(held)


def _part_key(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    norm: str,
    attacks: Sequence[str] | None,
    seed: int,
    queries: int,
) -> str:
    """Return a name for everything that a part's result depends on.

    The predicted classes are in it, for weights alone would mix up models that read them
    differently. (Not the logits: their last bits depend on the number of threads.)
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    digest = hashlib.sha256(json.dumps([eps, norm, attacks, seed, queries, kind]).encode())
    digest.update(weights_hash(model).encode())
    for tensor in (images, labels, predict(model, images).argmax(1)):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:24]


def _read_part(path: Path) -> Tensor | None:
    """Return the images held in a finished part; None if there is none or it is damaged."""
    try:
        return torch.tensor(json.loads(path.read_text()), dtype=torch.bool)
    except (OSError, ValueError, TypeError):
        return None


# --- the audit


def audit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    source: nn.Module | None = None,
    eps: float = 8 / 255,
    seed: int = 0,
) -> pd.DataFrame:
    """Run the checklist that tells robustness from its appearance.

    From Athalye et al. 2018 (1802.00420, section 3.1) and Carlini et al. 2019 (1902.06705). A line
    that fails does not prove that the model is weak, but that its figures cannot be trusted before
    somebody has found out why.

    Args:
        model: The model on trial.
        images: (N, 3, 32, 32) float in [0, 1]; a few hundred are enough.
        labels: (N,) int64, the true classes.
        source: Another model, from which attacks are transferred; None leaves that line out.
        eps: The threat model, L-inf.
        seed: Of noise and random starts.

    Returns:
        A row per line of the checklist: check, verdict ("pass", "ALARM" or "not run"), measured
        (the figures behind it) and n.
    """
    check_eps(eps)
    clean = _share(holds(model, images, labels))

    def accuracy(attack: str, size: float = eps) -> float:
        made = attacked(attack, model, images, labels, size, seed=seed)
        return _share(holds(model, made, labels))

    def fgsm_accuracies(maker: nn.Module, sizes: Sequence[float]) -> list[float]:
        direction = attack_direction("fgsm", maker, images, labels)  # one for every size
        return [_share(holds(model, perturb(images, direction, eps), labels)) for eps in sizes]

    noise, iterated = accuracy("noise"), accuracy("pgd-20")
    sweep = fgsm_accuracies(model, [eps * part / 4 for part in (1, 2, 3, 4)])
    one_step = sweep[-1]
    longer = pgd(model, images, labels, eps, alpha=eps / 10, steps=100, restarts=2, seed=seed + 1)
    converged = _share(holds(model, longer, labels))
    white = min(one_step, iterated, converged)
    transfer = fgsm_accuracies(source, (eps, 0.05, 0.1)) if source else []
    huge = accuracy("pgd-20", 0.5)
    rise = max(later - earlier for earlier, later in pairwise([clean, *sweep]))
    seen = [noise, iterated, converged, *transfer, *sweep]
    lengths = input_gradient(model, images, labels).flatten(1).norm(dim=1)
    flat = _share(lengths < 1e-12)
    middle = float(lengths.median())
    # Two accuracies on the same images differ by chance: two standard deviations, if a tenth of the
    # images change sides.
    near = max(0.01, 2 * math.sqrt(0.1 / len(images)))

    def line(check: str, passed: bool | None, measured: str) -> dict[str, Any]:
        verdict = "not run" if passed is None else "pass" if passed else "ALARM"
        return {"check": check, "verdict": verdict, "measured": measured, "n": len(images)}

    def percent(*values: float) -> list[str]:
        return [f"{100 * value:.1f} %" for value in values]

    def black_box() -> tuple[bool | None, str]:
        # Square takes long, and where nothing is left it can find nothing.
        if white <= near:
            return True, "white box {}, nothing is left to break".format(*percent(white))
        try:
            made = auto_attack(
                model, images, labels, eps, attacks=["square"], seed=seed, queries=1_000
            )
        except ImportError:
            return None, "needs the extra audit"
        square = _share(made)
        shown = "Square, 1,000 queries, {}, white box {}".format(*percent(square, white))
        return square >= white - near, shown

    return pd.DataFrame(
        [
            line(
                "iterated attack at least as strong as one step",
                iterated <= one_step + near,
                "PGD-20 {}, FGSM {}".format(*percent(iterated, one_step)),
            ),
            line(
                "white box at least as strong as transfer",
                white <= transfer[0] + near if transfer else None,
                "white box {}, transfer {}".format(*percent(white, transfer[0]))
                if transfer
                else "needs a source",
            ),
            line("black box weaker than white box", *black_box()),
            line(
                "accuracy falls to 0 as eps grows",
                huge <= near,
                "PGD-20 at eps 0.5: {}".format(*percent(huge)),
            ),
            line(
                "more steps and restarts change little",
                iterated - converged <= 0.02,
                "20 steps {}, 100 steps x 2 {}".format(*percent(iterated, converged)),
            ),
            line(
                "noise of the same size does little",
                clean - noise <= (clean - white) / 4 + near,
                "clean {}, noise {}".format(*percent(clean, noise)),
            ),
            line(
                "never more accurate than on clean images",
                max(seen) <= clean + near,
                "clean {}, best under attack {}".format(*percent(clean, max(seen))),
            ),
            line(
                "gradients neither vanish nor explode",
                flat <= near and 1e-6 < middle < 1e6,
                f"median length {middle:.2g}, all but 0 for {100 * flat:.1f} %",
            ),
            line(
                "accuracy falls steadily along the attack",
                rise <= near,
                "FGSM at 1/4, 1/2, 3/4, 1 eps: {}, {}, {}, {}".format(*percent(*sweep)),
            ),
        ]
    )


def _share(found: Tensor) -> float:
    return float(found.float().mean())
