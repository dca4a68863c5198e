"""AutoAttack, the field's standard measure of robustness, by its authors' code."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
ON_GPU = 1_000  # images of a part there: so many take it little longer than `CHUNK`
Each = Callable[[Callable[["Part"], list[bool]], Iterable["Part"]], Iterator[list[bool]]]
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
    each: Each = map,
) -> Tensor:
    """Attack with AutoAttack (Croce and Hein 2020, 2003.01690); return which images hold.

    Four attacks without parameters to tune, each on the images that hold so far: APGD on cross
    entropy, targeted APGD, targeted FAB, and Square, which uses no gradient. The code is its
    authors' (package pyautoattack). 100 images of a robust model take minutes, so each 100 that are
    done (on a GPU each 1,000) are kept in `store`, and an interrupted run goes on from there.

    Twelve parameters: those of the authors' class, and where parts are computed, kept and shown.

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
        each: Yields the result of `attack_part` for each part, in order. An executor's `map` does
            so side by side, in processes: the authors' code seeds torch's one generator.

    Returns:
        (N,) bool: the images that hold.

    Raises:
        ImportError: without the extra "audit".
        ValueError: if `eps` or `norm` is not as in `attacks.pgd`, there is no such version, it has
            no such part for so few classes, or the standard is asked of answers at random.
    """
    check_batch(images, labels)
    asked = {"eps": check_eps(eps, "eps", norm, images.shape[1:]), "norm": norm, "seed": seed}
    asked |= {"version": version, "attacks": attacks, "queries": queries}
    asked = _checked(model, images.detach(), labels, asked)
    kept, held = store if store and _is_known(model) else Store(None), list[bool]()
    with progress_bar(progress, len(images), "image") as bar:
        for part in _results(_parts(model, images.detach(), labels, asked), kept, each):
            held += part
            bar.update(len(part))
            bar.set_postfix(held=f"{sum(held) / len(held):.3f}")
    return torch.tensor(held, device=images.device)


def _checked(
    model: Classifier, images: Tensor, labels: Tensor, asked: dict[str, Any]
) -> dict[str, Any]:
    """Return what `auto_attack` was asked for, if it can be done; with the attacks chosen."""
    check_device(model, images)
    _authors_code()
    seed = check_integer("seed", asked["seed"])
    queries = check_integer("queries", asked["queries"], 1)
    outputs = check_outputs(predict(model, images[:CHUNK]), labels).shape[1]
    attacks = _choose(asked["version"], asked["attacks"], outputs)
    if set(attacks) != {"square"}:
        input_gradient(model, images[:1], labels[:1])  # refuses what has none
    if asked["version"] == "standard":
        _refuse_chance(model, images)
    return asked | {"seed": seed, "queries": queries, "attacks": attacks}


@dataclass(frozen=True)
class Part:
    """Images that are attacked together, and all that decides which of them hold.

    The random starts are drawn for all of them at once, so other parts have other starts. It can be
    sent to another process where the model can.

    Args:
        model: The attacked model.
        images: (N, C, H, W) float32, of the part's own memory.
        labels: (N,) int64.
        asked: What `auto_attack` was asked for, checked.
    """

    model: Classifier
    images: Tensor
    labels: Tensor
    asked: dict[str, Any]

    def key(self) -> str:
        """Return the name under which a store keeps which images hold."""
        assert isinstance(self.model, nn.Module)  # `_is_known`
        on = [repr(self.model), weights_hash(self.model), self.images, self.labels]
        package = metadata.version("pyautoattack")
        return key("autoattack", self.asked, package, *on, self.images.device.type)


def _parts(model: Classifier, images: Tensor, labels: Tensor, asked: dict[str, Any]) -> list[Part]:
    # Copies: a slice is sent with all that it is cut from. And what was made in inference mode has
    # no gradient outside it.
    size = ON_GPU if images.device.type == "cuda" else CHUNK
    with torch.inference_mode(False):
        batches = zip(images.split(size), labels.split(size), strict=True)
        as_rows = partial(torch.clone, memory_format=torch.contiguous_format)
        return [Part(model, as_rows(x.float()), y.clone(), asked) for x, y in batches]


def _results(parts: list[Part], store: Store, each: Each) -> Iterator[list[bool]]:
    """Yield for each part which images hold, computing what is not kept."""
    names = [part.key() if store.folder else "" for part in parts]
    kept = [store.find(name) for name in names]
    missing = [part for part, one in zip(parts, kept, strict=True) if one is None]
    computed = each(attack_part, missing)
    for name, one in zip(names, kept, strict=True):
        yield store.keep(name, next(computed)) if one is None else one


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


def attack_part(part: Part) -> list[bool]:
    """Return which images of a part hold, by the authors' code."""
    model, images, asked = part.model, part.images, part.asked

    def logits(x: Tensor) -> Tensor:
        return ask(model, x).clone()  # Square writes into what it is given

    options = {name: asked[name] for name in ("eps", "seed", "version")}
    options |= {"norm": {"linf": "Linf", "l2": "L2"}[asked["norm"]], "device": str(images.device)}
    gpus = [images.device] if images.device.type == "cuda" else []  # their code seeds those, too
    with gradient_mode(model, images.device), torch.random.fork_rng(gpus, device_type="cuda"):
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
        if asked["version"] == "standard":
            for attack in (attacker.apgd, attacker.apgd_targeted):
                attack.attack_single_run = partial(_walk, attack, attack.attack_single_run)
        # What was broken once is broken: asked again, a model could be right by chance.
        _, found = attacker.run_standard_evaluation(images, part.labels, batch_size=len(images))
    return (found == part.labels).tolist()


class _AllBroken(Exception):  # noqa: N818 - no error
    """Raised in the middle of a walk that has nothing left to do."""


def _walk(attack: Any, walk: Callable[..., Any], images: Tensor, labels: Tensor) -> tuple[Any, ...]:
    """Take the 100 steps of APGD, or so many as it takes to break every image.

    The authors' `walk` would take the others for nothing: of what it returns they use which images
    it broke, and a point that broke each. They ask the model about that point once more, so what is
    returned here is judged by their code as if by itself.

    Args:
        attack: Their APGD; `walk` is its method, which asks ``attack.model``.
        walk: The method that takes all steps.
        images: (N, C, H, W) float32, those that hold so far.
        labels: (N,) int64.

    Returns:
        Four values as theirs; the first and third are nowhere used.
    """
    broken, holds = images.clone(), torch.ones_like(labels, dtype=torch.bool)
    model = attack.model

    def watched(points: Tensor) -> Tensor:
        logits = model(points)
        wrong = logits.detach().max(1)[1] != labels
        broken[wrong] = points.detach()[wrong]
        holds[wrong] = False
        if not holds.any():
            raise _AllBroken
        return logits

    attack.model = watched
    try:
        return walk(images, labels)
    except _AllBroken:
        return broken, holds, None, broken
    finally:
        attack.model = model
