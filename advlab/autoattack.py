"""AutoAttack, the field's standard measure of robustness, by its authors' code."""

from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn

from advlab.attacks import check_eps
from advlab.checkpoints import weights_hash
from advlab.data import check_batch
from advlab.forward import CHUNK, Classifier, check_device, gradient_mode, holds, predict
from advlab.machine import progress_bar
from advlab.models import fastest_layout
from advlab.store import Store, key

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


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

    Ten parameters, a line each: those of the authors' class, and where parts are kept and shown.

    Args:
        model: The attacked model. Nothing is kept of one whose code is neither PyTorch's nor ours:
            nobody could tell whether it was edited.
        images, labels, eps, norm: As in `attacks.pgd`.
        attacks: Some of `PARTS`; None for all four, and with fewer than four classes for all but
            "apgd-t", whose loss compares four logits.
        seed: Of every random start.
        queries: How often Square may ask the model, per image; 5,000 is the standard.
        store: Where finished parts are kept; None keeps none.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        (N,) bool: the images that hold.

    Raises:
        ImportError: without the extra "audit".
        ValueError: if `eps` or `norm` is not as in `attacks.pgd`, or one of `attacks` does not
            exist, or not for so few classes.
    """
    check_batch(images, labels)
    check_device(model, images)
    _authors_code()
    asked = {
        "eps": check_eps(eps, "eps", norm, images.shape[1:]),
        "norm": norm,
        "attacks": _choose(attacks, outputs=predict(model, images[:1]).shape[1]),
        "seed": seed,
        "queries": queries,
    }
    kept = store if store and _is_known(model) else Store(None)
    held: list[bool] = []
    with progress_bar(progress, len(images), "image") as bar, gradient_mode(model, images.device):
        for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            name = ""
            if kept.folder:
                on = [repr(model), weights_hash(model), x, y, x.device.type]
                name = key("autoattack", asked, version("pyautoattack"), *on)
            held += kept.remember(name, lambda x=x, y=y: _attack(model, x, y, **asked))
            bar.update(len(y))
            bar.set_postfix(held=f"{sum(held) / len(held):.3f}")
    return torch.tensor(held, device=images.device)


def _authors_code() -> type:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs another package; install it with: pip install "advlab[audit]"'
        ) from error
    return AutoAttack


def _choose(attacks: Sequence[str] | None, outputs: int) -> list[str]:
    """Return the parts to run on a model of so many outputs."""
    possible = [name for name in PARTS if name != "apgd-t" or outputs >= 4]
    unknown = [name for name in attacks or () if name not in possible]
    if unknown:
        raise ValueError(
            f"no attack {', '.join(map(repr, unknown))} on {outputs} outputs; choose some of "
            f"{', '.join(possible)}"
        )
    return list(attacks or possible)


def _is_known(model: Classifier) -> bool:
    """Tell whether a key can hold all that decides what `model` computes."""
    if not isinstance(model, nn.Module):
        return False
    kinds = {type(module).__module__ for module in model.modules()}
    return all(kind.startswith(("torch.nn.", "advlab.")) for kind in kinds)


def _attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float,
    norm: str,
    attacks: Sequence[str],
    seed: int,
    queries: int,
) -> list[bool]:
    """Return which images hold."""

    def logits(x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=fastest_layout(model)))

    gpus = [images.device] if images.device.type == "cuda" else []  # their code seeds those, too
    with torch.random.fork_rng(gpus, device_type="cuda"):
        where = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "device": str(images.device)}
        attacker = _authors_code()(logits, eps=eps, seed=seed, **where)
        attacker.attacks_to_run = attacks  # some of them are as in the standard, too
        attacker.square.n_queries = queries
        outputs = predict(model, images[:1]).shape[1]
        if outputs < 10:  # the standard aims at nine other classes
            attacker.apgd_targeted.n_target_classes = outputs - 1
            attacker.fab.n_target_classes = outputs - 1
        made, _ = attacker.run_standard_evaluation(images.float(), labels, batch_size=CHUNK)
    return holds(model, made.clamp(0, 1), labels).tolist()
