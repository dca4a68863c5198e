"""AutoAttack, the field's standard measure of robustness, by its authors' code."""

import logging
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlab.attacks import check_eps, input_gradient
from advlab.checkpoints import weights_hash
from advlab.data import check_batch, check_integer, check_name
from advlab.forward import (
    CHUNK,
    Classifier,
    ask,
    check_device,
    check_outputs,
    gradient_mode,
    predict,
)
from advlab.machine import progress_bar
from advlab.store import Store, key

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
COMPARED = {"apgd-dlr": 3, "apgd-t": 4}  # so many logits, in the losses of these parts
FLAGS = "https://github.com/fra31/auto-attack/blob/master/flags_doc.md"


def auto_attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: float = 8 / 255,
    *,
    version: str = "standard",
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

    Eleven parameters, a line each: those of the authors' class, and where parts are kept and shown.

    Args:
        model: The attacked model. Nothing is kept of one whose code is neither PyTorch's nor ours:
            nobody could tell whether it was edited.
        images, labels, eps, norm: As in `attacks.pgd`.
        version: "standard", or for a model that answers at random "rand": APGD on two losses, whose
            every gradient is the average of 20 (EOT; Athalye et al. 2018, 1707.07397).
        attacks: Some parts of the version (`VERSIONS`); None for all but those whose loss compares
            more logits than there are (`COMPARED`).
        seed: Of every random start.
        queries: How often Square may ask the model, per image; 5,000 is the standard.
        store: Where finished parts are kept; None keeps none.
        progress: Label of a tqdm bar; None shows none.

    Returns:
        (N,) bool: the images that hold.

    Raises:
        ImportError: without the extra "audit".
        ValueError: if `eps` or `norm` is not as in `attacks.pgd`, there is no such version, it has
            no such part for so few classes, or the standard is asked of answers at random.
    """
    check_batch(images, labels)
    check_device(model, images)
    _authors_code()
    images = images.detach()
    asked: dict[str, Any] = {"eps": check_eps(eps, "eps", norm, images.shape[1:]), "norm": norm}
    asked |= {"seed": check_integer("seed", seed), "version": version}
    asked["queries"] = check_integer("queries", queries, 1)
    outputs = check_outputs(predict(model, images[:CHUNK]), labels).shape[1]
    asked["attacks"] = _choose(version, attacks, outputs)
    if set(asked["attacks"]) != {"square"}:
        input_gradient(model, images[:1], labels[:1])  # refuses what has none
    if version == "standard":
        _refuse_chance(model, images)
    kept = store if store and _is_known(model) else Store(None)
    held: list[bool] = []
    with progress_bar(progress, len(images), "image") as bar, gradient_mode(model, images.device):
        for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            name = ""
            if kept.folder and isinstance(model, nn.Module):
                name = _key(model, x, y, asked)
            held += kept.remember(name, partial(_attack, model, x, y, asked))
            bar.update(len(y))
            bar.set_postfix(held=f"{sum(held) / len(held):.3f}")
    return torch.tensor(held, device=images.device)


def _key(model: nn.Module, images: Tensor, labels: Tensor, asked: dict[str, Any]) -> str:
    on = [repr(model), weights_hash(model), images, labels, images.device.type]
    return key("autoattack", asked, metadata.version("pyautoattack"), *on)


def _refuse_chance(model: Classifier, images: Tensor) -> None:
    if answers_vary(model, images):
        raise ValueError(
            "the model answers differently when asked again, and the standard version would find "
            'it more robust than it is; give version="rand", which averages its gradients'
        )


def answers_vary(model: Classifier, images: Tensor) -> bool:
    """Tell whether a model answers at random: otherwise when it is asked again.

    It is asked five times about the first images, (N, C, H, W) float in [0, 1]. Logits of length 1
    may differ by 1e-4, as rounding on a GPU makes them: the numbers of AutoAttack's own check.
    """
    first, *others = (F.normalize(predict(model, images[:CHUNK])) for _ in range(5))
    return max(float((other - first).norm(dim=1).max()) for other in others) > 1e-4


def _authors_code() -> type:
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            'AutoAttack needs another package; install it with: pip install "advlab[audit]"'
        ) from error
    # Its warnings name a file of its repository, which nobody has who installed the package.
    logging.getLogger("auto-attack").addFilter(_with_address)
    return AutoAttack


def _with_address(record: logging.LogRecord) -> bool:
    record.msg = record.msg.replace("See flags_doc.md", f"See {FLAGS}")
    return True


def parts_of(version: str, outputs: int) -> list[str]:
    """Return the parts of a version that a model of so many outputs can be attacked with."""
    check_name("version", version, VERSIONS)
    return [name for name in VERSIONS[version] if outputs >= COMPARED.get(name, 2)]


def _choose(version: str, attacks: Sequence[str] | None, outputs: int) -> list[str]:
    possible = parts_of(version, outputs)
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


def _attack(model: Classifier, images: Tensor, labels: Tensor, asked: dict[str, Any]) -> list[bool]:
    """Return which images hold by the authors' code, asked as `auto_attack` is."""

    def logits(x: Tensor) -> Tensor:
        return ask(model, x).clone()  # Square writes into what it is given

    # Clones, as what was made in inference mode has no gradient outside it either.
    images, labels = images.float().clone(memory_format=torch.contiguous_format), labels.clone()
    options = {name: asked[name] for name in ("eps", "seed", "version")}
    options |= {"norm": {"linf": "Linf", "l2": "L2"}[asked["norm"]], "device": str(images.device)}
    gpus = [images.device] if images.device.type == "cuda" else []  # their code seeds those, too
    with torch.random.fork_rng(gpus, device_type="cuda"):
        # What a model draws before they do so; `torch.manual_seed` would seed every GPU.
        torch.default_generator.manual_seed(asked["seed"])
        torch.cuda.manual_seed(asked["seed"])
        attacker = _authors_code()(logits, **options)
        attacker.attacks_to_run = asked["attacks"]  # some of them are as in the version, too
        attacker.square.n_queries = asked["queries"]
        outputs = predict(model, images[:1]).shape[1]
        if outputs < 10:  # the standard aims at nine other classes
            attacker.apgd_targeted.n_target_classes = outputs - 1
            attacker.fab.n_target_classes = outputs - 1
        # What was broken once is broken: asked again, a model could be right by chance.
        _, found = attacker.run_standard_evaluation(images, labels, batch_size=CHUNK)
    return (found == labels).tolist()
