"""One table: each public function that takes images, and each kind of input that is refused."""

import inspect
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_small_cnn
from torch import nn

from advlab import adaptive, attacks, forward, minimal, proofs
from advlab.adaptive import has_gradient, share_held
from advlab.attacks import bim, fgsm, fgsm_direction, input_gradient, mifgsm, perturb, pgd, rfgsm
from advlab.audit import Trial
from advlab.autoattack import auto_attack
from advlab.catalogue import ATTACKS
from advlab.evaluation import minimal_eps
from advlab.forward import evaluate, holds, predict
from advlab.minimal import carlini_wagner, deepfool, jsma
from advlab.transforms import FGSMTransform

IMAGES, LABELS = make_batch(12)
MODEL = make_small_cnn()


def trial(model, images, labels, **settings):
    return Trial(model, images, labels, **settings).iterated


# Called with a model, images and labels; and with eps, and a seed, where they take one.
MEASURES = {"predict": lambda model, images, _: predict(model, images)}
MEASURES |= {"evaluate": evaluate, "holds": holds, "share_held": partial(share_held, asks=2)}
MEASURES["has_gradient"] = lambda model, images, _: torch.tensor(has_gradient(model, images))
GRADIENTS = {"input_gradient": input_gradient, "fgsm_direction": fgsm_direction}
SIZED = {
    "fgsm": partial(fgsm, eps=0.1),
    "bim": partial(bim, eps=0.1, alpha=0.1, steps=1),
    "mifgsm": partial(mifgsm, eps=0.1, steps=1),
    "transform": lambda model, x, y, eps=0.1: FGSMTransform(model, eps)(x, y),
}
SEEDED = {
    "pgd": partial(pgd, eps=0.1, alpha=0.1, steps=1),
    "rfgsm": partial(rfgsm, eps=0.1, alpha=0.1),
    "trial": partial(trial, eps=0.1),
    "auto_attack": partial(auto_attack, eps=0.1, attacks=["apgd-ce"], queries=1),
    **{name: partial(attack, eps=0.1) for name, attack in ATTACKS.items() if attack.gradient},
}
NO_GRADIENT = {name: partial(a, eps=0.1) for name, a in ATTACKS.items() if not a.gradient}
MINIMAL = {
    "deepfool": partial(deepfool, steps=2),
    "carlini_wagner": partial(carlini_wagner, steps=2, searches=1),
    "jsma": partial(jsma, gamma=0.001, pairs=False),
}
MEASURES["distortion"] = lambda model, images, labels: minimal.distortion(
    model, images, labels, IMAGES
)
PROOFS = {  # more of these is in test_proofs.py
    "certify": lambda model, images, _: proofs.certify(model, images, 0.1, n0=1, n=1),
    "interval_bounds": lambda model, images, _: proofs.interval_bounds(model, images, 0.01),
    "worst_margins": partial(proofs.worst_margins, eps=0.01),
}
ATTACKING = MINIMAL | GRADIENTS | SIZED | SEEDED | {"minimal_eps": minimal_eps}
ALL = MEASURES | ATTACKING | NO_GRADIENT


def spoilt(value):
    images = IMAGES.clone()
    images[2, 1, 5, 5] = value
    return images


BAD_IMAGES = {
    "uint8": ((IMAGES * 255).byte(), r"images are torch.uint8; give a float.*to_float"),
    "numpy": (IMAGES.numpy(), "images are ndarray; give a float tensor.*as_tensor"),
    "none": (None, "images are NoneType; give a float"),
    "one": (IMAGES[0], r"\(3, 32, 32\); it must be \(N, C, H, W\); images\[None\] for one image"),
    "plane": (IMAGES[0, 0], r"\(32, 32\); it must be \(N, C, H, W\)$"),
    "last": (IMAGES.permute(0, 2, 3, 1), r"\(12, 32, 32, 3\); .*permute\(0, 3, 1, 2\)"),
    "empty": (IMAGES[:0], r"the batch is empty \(0, 3, 32, 32\); give at least one"),
    "no width": (IMAGES[..., :0], r"the batch is empty \(12, 3, 32, 0\)"),
    "above": (spoilt(1.001), r"to 1\.001; they must lie in \[0, 1\]"),
    "below": (spoilt(-0.5), r"range from -0\.5 .*normalise inside the model"),
    "nan": (spoilt(math.nan), "nan; they must lie in .* hold no NaN"),
    "inf": (spoilt(math.inf), "to inf; they must lie"),
    "8-bit": (IMAGES * 255, "Divide 8-bit images by 255"),
}


def pairs(functions, kinds, **left_out):
    """Parametrise by each function and each kind, but for the kinds that one has `left_out`."""
    chosen = [(f, k) for f in functions for k in kinds if k not in left_out.get(f, ())]
    return pytest.mark.parametrize(("name", "kind"), chosen)


# The transform takes one image, too, and says what belongs before it.
@pairs(ALL | PROOFS, BAD_IMAGES, transform=("numpy", "none", "one"))
def test_bad_images(name, kind):
    images, told = BAD_IMAGES[kind]
    with pytest.raises((TypeError, ValueError), match=told):
        (ALL | PROOFS)[name](MODEL, images, LABELS)


SOFT = torch.full((12, 10), 0.1)
BAD_LABELS = {
    "int32": (LABELS.int(), r"labels are torch.int32; give an int64 .*\(labels.long\(\)\)"),
    "float": (LABELS.float(), "labels are torch.float32; give an int64 tensor of class numbers$"),
    "soft": (SOFT, r"labels are torch.float32; give one class .*labels.argmax\(1\)"),
    "numpy": (LABELS.numpy(), r"labels are ndarray; give .*torch.as_tensor\(labels\).long"),
    "list": (LABELS.tolist(), "labels are list; give"),
    "short": (LABELS[:3], r"labels have shape \(3,\) for 12 images; it must be \(12,\)"),
    "column": (LABELS[:, None], r"labels have shape \(12, 1\) for 12 images"),
    "negative": (LABELS - 20, r"labels hold -\d+; classes count from 0"),
    "device": (LABELS.to("meta"), r"images are on cpu, labels on meta; .*labels.to"),
    "none such": (LABELS + 10, r"label 1\d has no logit: the model returned 10 of them"),
}


# The transform takes what a data loader makes, noise asks no model, some take no labels.
@pairs(
    ALL | PROOFS,
    BAD_LABELS,
    predict=BAD_LABELS,
    has_gradient=BAD_LABELS,
    certify=BAD_LABELS,
    interval_bounds=BAD_LABELS,
    noise=("none such",),
    transform=("numpy", "list", "column", "device"),
)
def test_bad_labels(name, kind):
    labels, told = BAD_LABELS[kind]
    with pytest.raises((TypeError, ValueError), match=told):
        (ALL | PROOFS)[name](MODEL, IMAGES, labels)


class Answers(nn.Module):
    """A model whose answer is changed before it is given."""

    def __init__(self, change):
        super().__init__()
        self.network, self.change = make_small_cnn(), change

    def forward(self, x):
        return self.change(self.network(x))


def negative_variance():
    model = make_small_cnn()
    model[2].running_var[0] = -1
    return model


IN_TRAINING = make_small_cnn().train()
BAD_MODELS = {
    "rank": (Answers(lambda y: y.sum(1)), r"returned \(12,\) for 12 images; .*\(12, classes\)"),
    "length": (Answers(lambda y: y[:6]), r"returned \(6, 10\) for 12 images; .*\(12, classes\)"),
    "tuple": (Answers(lambda y: (y, y)), "returned a tuple for 12 images; .*wrap it in a model"),
    "dict": (Answers(lambda y: {"logits": y}), "returned a dict for 12 images"),
    "few": (Answers(lambda y: y[:, :2]), r"label \d has no logit: the model returned 2"),
    "nan": (Answers(lambda y: y / 0 * 0), "NaN or infinity for 12 of 12 images"),
    "inf": (Answers(lambda y: y + math.inf), "NaN or infinity for 12 of 12 images"),
    "variance": (
        negative_variance(),
        r"for \d+ of \d+ images that it was given at once;.*running variances",
    ),
    "device": (make_small_cnn().to("meta"), r"model is on meta, the images on cpu; move one"),
    "training": (
        lambda x: IN_TRAINING(x),
        r"calls a model \(Sequential\) that is in training mode; call its eval\(\) first",
    ),
}


# Two know no labels; per-image statistics need no running variance, and take no function.
@pairs(
    MEASURES | ATTACKING,
    BAD_MODELS,
    predict=("few",),
    has_gradient=("few", "length"),
    **{"fgsm-per-image": ("variance", "training")},
)
def test_bad_models(name, kind):
    model, told = BAD_MODELS[kind]
    if name in ("auto_attack", "has_gradient"):  # they first ask for one image
        told = told.replace("12", r"\d+")
    with pytest.raises(ValueError, match=told):
        ALL[name](model, IMAGES, LABELS)


BLIND = {
    "detached": (Answers(lambda y: y.detach()), "logits carry no gradient"),
    "constant": (Answers(lambda y: torch.zeros(len(y), 10)), "logits carry no gradient"),
    "one-hot": (
        Answers(lambda y: nn.functional.one_hot(y.argmax(1), 10)),
        "logits carry no gradient",
    ),
    "root": (
        Answers(lambda y: y + ((y - y).abs() ** 0.5)),
        r"is NaN or infinite for \d+ of \d+ images that it was given at once; .*square root",
    ),
}


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("name", ATTACKING)
def test_models_without_a_gradient(name, kind):
    model, told = BLIND[kind]
    labels = predict(model, IMAGES).argmax(1)
    with pytest.raises(ValueError, match=told):
        ATTACKING[name](model, IMAGES, labels)


BAD_EPS = (-0.01, 1.01, 8, math.nan, math.inf, None, "0.1", True, [0.1])


@pytest.mark.parametrize("eps", BAD_EPS, ids=str)
@pytest.mark.parametrize("name", SIZED | SEEDED | NO_GRADIENT | {"perturb": None})
def test_bad_eps(name, eps):
    call = {**ALL, "perturb": lambda _, x, y, eps: perturb(x, x.sign(), eps)}[name]
    with pytest.raises(ValueError, match=rf"eps is {re.escape(repr(eps))}; it must be a number"):
        call(MODEL, IMAGES, LABELS, eps=eps)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "0", True], ids=str)
@pytest.mark.parametrize("name", [*SEEDED, "minimal_eps"])
def test_bad_seeds(name, seed):
    told = rf"seed is {re.escape(repr(seed))}; it must be an integer from 0 on"
    with pytest.raises(ValueError, match=told):
        ALL[name](MODEL, IMAGES, LABELS, seed=seed)


@pytest.mark.parametrize("count", [0, -3, 1.5, None, "2", True], ids=str)
@pytest.mark.parametrize(
    ("name", "option"),
    [("pgd", "steps"), ("pgd", "restarts"), ("mifgsm", "steps"), ("bim", "steps")],
)
def test_bad_counts(name, option, count):
    told = rf"{option} is {re.escape(repr(count))}; it must be an integer from 1 on"
    with pytest.raises(ValueError, match=told):
        ALL[name](MODEL, IMAGES, LABELS, **{option: count})


# --- what is taken as it is, and must come out right


KINDS = {
    "float64": (MODEL, IMAGES.double()),
    "float16": (MODEL, IMAGES.half()),
    "bfloat16": (MODEL, IMAGES.bfloat16()),
    "double model": (make_small_cnn().double(), IMAGES),
    "half model": (make_small_cnn().half(), IMAGES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_other_dtypes_are_measured_as_float32_is(name, kind):
    model, images = KINDS[kind]
    labels = predict(MODEL, images).argmax(1)
    if name in MINIMAL and images.dtype in attacks.COARSE:  # a shortest way would be rounded away
        with pytest.raises(TypeError, match="steps are larger than a shortest way out"):
            ALL[name](model, images, labels)
        return
    found = ALL[name](model, images, labels)
    if name == "auto_attack":
        assert found.dtype == torch.bool
    elif name == "predict":
        torch.testing.assert_close(found, predict(MODEL, images), rtol=0.01, atol=0.01)
    elif name in SIZED | SEEDED | NO_GRADIENT and name not in ("trial",):
        found = found[0] if name == "transform" else found
        assert found.dtype == images.dtype
        assert float((found.double() - images.double()).abs().max()) <= 0.1 + 1e-7
        broken = 12 - evaluate(MODEL, found, labels)[0]
        expected = ALL[name](MODEL, images.float(), labels)
        expected = expected[0] if name == "transform" else expected
        assert abs(broken - 12 + evaluate(MODEL, expected, labels)[0]) <= 1


@pytest.mark.parametrize("name", ALL)
def test_callers_images_and_statistics_are_left_alone(name):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = make_small_cnn()

        def forward(self, x):
            return self.network(x.sub_(0.5).div_(0.25))

    model, images = InPlace().eval(), IMAGES.clone()
    ALL[name](model, images, LABELS)
    assert torch.equal(images, IMAGES)


def test_default_dtype_of_the_caller_changes_nothing():
    expected = pgd(MODEL, IMAGES, LABELS, 0.1, alpha=0.02, steps=3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = pgd(MODEL, IMAGES, LABELS, 0.1, alpha=0.02, steps=3)
        own = ATTACKS["pgd-20"](make_small_cnn().double(), IMAGES, LABELS, 0.1)
    finally:
        torch.set_default_dtype(before)
    assert made.dtype == own.dtype == torch.float32
    assert float((made - IMAGES).abs().max()) <= 0.1 + 1e-6
    assert evaluate(MODEL, made, LABELS)[0] == evaluate(MODEL, expected, LABELS)[0]


def test_the_table_is_complete():
    # Every public function that takes a model and images stands in the tables above.
    inside = {"attack_loss", "check_targets", "check_device", "ask", "gradient_of", "check_outputs"}
    inside |= {"recurrent_gradients", "gradient_mode", "eval_mode", "float32_mode", "check_eps"}
    inside |= {"per_image_statistics_mode", "modules_of", "sharing"}
    inside |= {"check_sigma", "check_alpha", "clopper_pearson"}
    written = Path(__file__).read_text()
    for module in (adaptive, attacks, forward, minimal, proofs):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert name in inside or f'"{name}"' in written, name
