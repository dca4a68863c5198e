"""What there is: attacks and lessons here, and where the rest is declared.

Each has one entry. Tables, keys of kept results, the command line, the explorer and the benchmark
read it there, so that a new one needs its entry and nothing else:

- an attack: its function in `advlab.attacks`, its entry in `ATTACKS`;
- a data set: `advlab.datasets.DATASETS`;
- an architecture: `advlab.models.ARCHITECTURES`;
- a recipe: `advlab.recipes.RECIPES`;
- a lesson: its notebook, its entry in `LESSONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advlab.attacks import check_eps, fgsm_direction, mifgsm, perturb, pgd, rfgsm
from advlab.data import check_batch, check_integer, check_name
from advlab.datasets import DATASETS
from advlab.forward import Classifier, holds
from advlab.models import ARCHITECTURES
from advlab.recipes import RECIPES, Model, Profile

__all__ = ["ARCHITECTURES", "ATTACKS", "DATASETS", "LESSONS", "RECIPES", "Attack", "Lesson"]


@dataclass(frozen=True)
class Attack:
    """An attack by name, within `eps` of each pixel.

    Args:
        name: What tables, files and the command line call it.
        about: One line for help.
        function: ``function(model, images, labels, seed)`` returns one direction for every eps,
            int8 signs, where `one_direction` is set; else ``function(model, images, labels, eps,
            seed)`` returns attacked images.
        one_direction: Whether the same direction serves every eps.
        random: Whether it draws random numbers, and its result depends on the seed.
        gradient: Whether it asks for the model's gradient; else it is the same for every model.
        board: Whether boards of models have a column for it.
    """

    name: str
    about: str
    function: Callable[..., Tensor]
    one_direction: bool = False
    random: bool = True
    gradient: bool = True
    board: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether its code is of this package, so that `store.key` notices an edit."""
        function = getattr(self.function, "func", self.function)
        return function.__module__.startswith("advlab.")

    def direction(
        self, model: Classifier, images: Tensor, labels: Tensor, *, seed: int = 0
    ) -> Tensor:
        """Return the signs (int8, like `images`) along which the attack moves them.

        Raises:
            ValueError: if its direction depends on eps.
        """
        if not self.one_direction:
            raise ValueError(f"{self.name} has another direction for every eps; call it with one")
        check_batch(images, labels)
        check_integer("seed", seed)
        return self.function(model, images, labels, seed)

    def __call__(
        self, model: Classifier, images: Tensor, labels: Tensor, eps: float, *, seed: int = 0
    ) -> Tensor:
        """Return `images` attacked within `eps`, from 0 to 1.

        Args:
            model, images, labels: As in `attacks.input_gradient`.
            eps: Size of the attack.
            seed: Of noise and random starts.
        """
        check_batch(images, labels)
        check_integer("seed", seed)
        images = images.detach()
        if check_eps(eps) == 0:
            return images
        if self.one_direction:
            return perturb(images, self.direction(model, images, labels, seed=seed), eps)
        return self.function(model, images, labels, eps, seed)


def _fgsm(model: Classifier, x: Tensor, y: Tensor, seed: int, per_image: bool) -> Tensor:
    return fgsm_direction(model, x, y, per_image_statistics=per_image)


def _noise(model: Classifier, x: Tensor, y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(x.device)


def _rfgsm(model: Classifier, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    return rfgsm(model, x, y, eps, alpha=min(1, 1.25 * eps), seed=seed)


def _mifgsm(model: Classifier, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    return mifgsm(model, x, y, eps)


def _pgd_20(model: Classifier, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    return pgd(model, x, y, eps, alpha=eps / 8, steps=20, seed=seed)


def _pgd_50x3(model: Classifier, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
    attack = partial(pgd, eps=eps, alpha=eps / 8, steps=50, restarts=3, seed=seed)
    made = attack(model, x, y)
    left = holds(model, made, y)
    if left.any():
        made[left] = attack(model, x[left], y[left], loss="margin")
    return made


# Each is stronger than the one before, from noise on.
_ATTACKS = (
    Attack(
        "fgsm-per-image",
        "FGSM with each image's own statistics, as in the paper's tables",
        partial(_fgsm, per_image=True),
        one_direction=True,
        random=False,
    ),
    Attack(
        "noise",
        "a random sign per pixel, the control of the same size",
        _noise,
        one_direction=True,
        gradient=False,
    ),
    Attack(
        "fgsm",
        "one step along the sign of the gradient, taken in eval mode",
        partial(_fgsm, per_image=False),
        one_direction=True,
        random=False,
        board=True,
    ),
    Attack("rfgsm", "one step of 1.25 eps from a random start", _rfgsm),
    Attack("mi-fgsm", "10 steps with momentum, made to transfer", _mifgsm, random=False),
    Attack("pgd-20", "20 steps of eps / 8 from a random start", _pgd_20, board=True),
    Attack(
        "pgd-50x3",
        "50 steps from 3 random starts on cross entropy, then on the margin for what holds: on "
        "robust models either loss breaks images that the other does not",
        _pgd_50x3,
        board=True,
    ),
)
ATTACKS = {attack.name: attack for attack in _ATTACKS}


def attack_named(name: str) -> Attack:
    """Return the attack of that name; a ValueError names those that there are."""
    check_name("attack", name, ATTACKS)
    return ATTACKS[name]


@dataclass(frozen=True)
class Lesson:
    """A lesson.

    Args:
        name: Of its notebook, without ending: a number of two digits, and a word or more.
        title: What it is about.
        needs: Returns the models that it asks for, for a profile; they are trained beforehand.
        minutes: To study it, without the exercises.
        after: Numbers of the lessons that it builds on.
    """

    name: str
    title: str
    needs: Callable[[Profile], list[Model]]
    minutes: int
    after: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """Its number, of two digits."""
        return self.name[:2]


_LESSONS = (
    Lesson(
        "01_baseline",
        "Baseline: the network that will be attacked",
        lambda profile: [("cnn", 0.0)],
        minutes=60,
    ),
    Lesson(
        "02_fgsm",
        "FGSM: fooling a network with one gradient",
        lambda profile: [("cnn-lstm", 0.0), ("cnn", 0.0)],
        minutes=60,
        after=("01",),
    ),
    Lesson(
        "03_augmentation",
        "Augmentation: attacked images as training data",
        lambda profile: [("cnn", 0.0)],
        minutes=45,
        after=("02",),
    ),
    Lesson(
        "04_robust_training",
        "Robust training: the paper's tables, rebuilt",
        lambda profile: [m for m in profile.paper_models() if m[0] != "cnn-lstm-positions"],
        minutes=60,
        after=("03",),
    ),
    Lesson(
        "05_architecture_comparison",
        "Architecture comparison: does an LSTM help against adversarial examples?",
        lambda profile: [m for m in profile.paper_models() if m[1] in (0.0, 0.2)],
        minutes=60,
        after=("04",),
    ),
    Lesson(
        "06_defence_on_trial",
        "The defence on trial: what the model's own gradient reveals",
        lambda profile: profile.paper_models() + profile.adversarial_models(),
        minutes=75,
        after=("02", "04"),
    ),
    Lesson(
        "07_adversarial_training",
        "Adversarial training: a defence that holds",
        lambda profile: [("cnn", 0.0), ("cnn", 0.2), *profile.adversarial_models()],
        minutes=60,
        after=("06",),
    ),
    Lesson(
        "08_break_it_yourself",
        "Break it yourself: an open challenge",
        lambda profile: [("cnn", profile.adversarial["robust"])],
        minutes=30,
        after=("06", "07"),
    ),
    Lesson(
        "09_shortest_way_out",
        "The shortest way out: DeepFool, C&W, JSMA",
        lambda profile: [("cnn", 0.0), ("cnn", 0.2), ("cnn", profile.adversarial["robust"])],
        minutes=75,
        after=("06", "07"),
    ),
    Lesson(
        "10_attacks_that_adapt",
        "Attacks that adapt: BPDA, EOT and another loss",
        lambda profile: [("cnn", 0.0), ("cnn", profile.adversarial["robust"])],
        minutes=75,
        after=("06", "07"),
    ),
    Lesson(
        "11_noise_that_proves",
        "Noise that proves: certificates by smoothing and by intervals",
        lambda profile: [
            ("cnn", 0.0),
            ("cnn", profile.adversarial["robust"]),
            ("cnn", profile.noise),
        ],
        minutes=75,
        after=("03", "06", "07"),
    ),
)
LESSONS = {lesson.name: lesson for lesson in _LESSONS}
