"""AutoAttack, the field's standard measure of robustness, by its authors' code."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advlab.attacks import check_size
from advlab.checkpoints import weights_hash
from advlab.data import check_batch
from advlab.forward import CHUNK, Classifier, check_device, gradient_mode, holds, predict
from advlab.machine import progress_bar
from advlab.models import fastest_layout
from advlab.store import Store, key


def auto_attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float = 8 / 255,
    *,
    attacks: Sequence[str] | None = None,
    norm: str = "linf",
    seed: int = 0,
    queries: int = 5_000,
    store: Store | None = None,
    progress: str | None = None,
) -> Tensor:
    """Attack with AutoAttack (Croce and Hein 2020, 2003.01690); return which images hold.

    Four attacks without parameters to tune, each on the images that hold so far: APGD on cross
    entropy, targeted APGD, targeted FAB, and Square, which uses no gradient. The code is its
    authors' (package pyautoattack). It takes minutes for 100 images of a robust model, so each 100
    images that are done are kept in `store`, and an interrupted run goes on from there.

    Ten parameters: those of the authors' class, and where parts are kept and shown.

    Args:
        model: The attacked model. What it is must show in its weights to be kept: of a plain
            function nothing is.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64, the true classes.
        eps: Largest change, as in `attacks.pgd`.
        attacks: Some of "apgd-ce", "apgd-t", "fab-t", "square"; None for all four, and with fewer
            than four classes for all but "apgd-t", whose loss compares four logits.
        norm: "linf" or "l2".
        seed: Of every random start.
        queries: How often Square may ask the model, per image; 5,000 is the standard.
        store: Where finished parts are kept; None keeps none.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        (N,) bool: the images that hold.

    Raises:
        ImportError: without the extra "audit".
        ValueError: if `eps` or `norm` is not as in `attacks.pgd`.
    """
    check_batch(images, labels)
    check_size(eps, norm, images.shape[1:])
    check_device(model, images)
    device = images.device
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs another package; install it with: pip install "advlab[audit]"'
        ) from error

    def logits(x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=fastest_layout(model)))

    outputs = predict(model, images[:1]).shape[1]
    if attacks is None and outputs < 4:
        attacks = ("apgd-ce", "fab-t", "square")
    chosen = {"attacks": list(attacks), "version": "custom"} if attacks else {}

    def attack(x: Tensor, y: Tensor) -> list[bool]:
        where = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "device": str(device)}
        gpus = [device] if device.type == "cuda" else []  # their code seeds those as well
        with torch.random.fork_rng(gpus, device_type="cuda"):
            attacker = AutoAttack(logits, eps=eps, seed=seed, **where, **chosen)
            attacker.square.n_queries = queries
            if outputs < 10:  # the standard aims at nine other classes
                attacker.apgd_targeted.n_target_classes = outputs - 1
                attacker.fab.n_target_classes = outputs - 1
            made, _ = attacker.run_standard_evaluation(x.float(), y, batch_size=CHUNK)
        return holds(model, made.clamp(0, 1), y).tolist()

    asked = [eps, norm, list(attacks or ()), seed, queries, device.type]
    kept = store if store and isinstance(model, nn.Module) else Store(None)
    held: list[bool] = []
    with progress_bar(progress, len(images), "image") as bar, gradient_mode(model, device):
        for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            name = _part_key(model, x, y, asked) if kept.folder else ""
            held += kept.remember(name, lambda x=x, y=y: attack(x, y))
            bar.update(len(y))
            bar.set_postfix(held=f"{sum(held) / len(held):.3f}")
    return torch.tensor(held, device=device)


def _part_key(model: nn.Module, images: Tensor, labels: Tensor, asked: list[Any]) -> str:
    """Return the key of a part.

    The predicted classes are in it, for weights alone would mix up models that read them
    differently. (Not the logits: their last bits depend on the number of threads.)
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    answers = predict(model, images).argmax(1)
    return key("autoattack", asked, kind, weights_hash(model), images, labels, answers)
