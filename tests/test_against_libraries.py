"""Attacks and bounds of other libraries agree with ours on the same model and images."""

import copy
import functools

import pytest
import torch
from conftest import balance, make_batch, make_small_cnn, randomise_batch_norm

from advlab import checkpoints, datasets, evaluation, files, minimal, models, proofs
from advlab.attacks import fgsm, mifgsm, pgd
from advlab.bench import rivals

MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}
STEPS = 10
PGD_EPS = 0.002  # breaks about half of the images
L2_EPS = 0.06  # so does this


@pytest.fixture(params=["small", "cnn", "cnn-lstm"])
def case(request):
    """A model with images that it gets right, and their labels."""
    if request.param == "small":
        model = make_small_cnn()
    else:
        torch.manual_seed(0)
        model = randomise_batch_norm(models.build(request.param)).eval()
    images, _ = make_batch(16)
    return model, images, balance(model, images)


@pytest.fixture(params=MODULES)
def set_up(request):
    """Sets up a library for a model and a size of step, as the benchmark does."""
    reason = f"{request.param} is not installed; it is in the extra [bench]"
    pytest.importorskip(MODULES[request.param], reason=reason)

    def make(model, alpha):
        return rivals.libraries(model, alpha, STEPS)[request.param]

    return make


def test_fgsm_agrees(case, set_up):
    model, images, labels = case
    theirs = set_up(model, rivals.EPS / 4).fgsm(images, labels)
    ours = fgsm(model, images, labels, rivals.EPS)
    assert theirs.shape == ours.shape
    # To 1e-6, but for signs of gradients that rounding cannot tell from 0.
    assert float(((theirs - ours).abs() > 1e-6).float().mean()) <= 1e-4


def assert_no_weaker(case, theirs, norm, eps):
    """Assert that our PGD keeps the ball and breaks every image that theirs breaks."""
    model, images, labels = case
    options = {"alpha": eps / 4, "steps": STEPS, "random_start": False, "norm": norm}
    ours = pgd(model, images, labels, eps, **options)
    with torch.no_grad():
        broken_by_them, broken_by_us = (model(x).argmax(1) != labels for x in (theirs, ours))
    for made in (theirs, ours):
        change = (made - images).flatten(1)
        length = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert float(length.max()) <= eps + (1e-6 if norm == "linf" else 1e-5)
    assert 2 < int(broken_by_them.sum()) < 14
    assert bool(broken_by_us[broken_by_them].all())


def test_pgd_breaks_every_image_that_a_library_breaks(case, set_up, monkeypatch):
    monkeypatch.setattr(rivals, "EPS", PGD_EPS)
    theirs = set_up(case[0], PGD_EPS / 4).pgd(*case[1:])
    assert_no_weaker(case, theirs, "linf", PGD_EPS)


@functools.cache
def first_images(root):
    """Return the first 50 test images of CIFAR-10 and their labels."""
    return datasets.load("cifar10", root).test.first(50).batch(slice(None))


@pytest.mark.parametrize("arch", ["cnn", "cnn-lstm"])
def test_pgd_on_the_shipped_robust_models_is_as_strong_as_a_library(arch, set_up, cifar10_root):
    path = files.shipped_checkpoints() / f"{arch}-robust-seed0.safetensors"
    model, alpha = checkpoints.load(path).model, rivals.EPS / 4
    images, labels = first_images(cifar10_root)
    theirs = set_up(model, alpha).pgd(images, labels)
    ours = pgd(model, images, labels, rivals.EPS, alpha=alpha, steps=STEPS, random_start=False)
    left = [int(evaluation.holds(model, made, labels).sum()) for made in (ours, theirs)]
    assert 0 < left[0] <= left[1] < 50


def l2_of_torchattacks(model, alpha):
    import torchattacks

    return torchattacks.PGDL2(model, eps=L2_EPS, alpha=alpha, steps=STEPS, random_start=False)


def l2_of_foolbox(model, alpha):
    import foolbox

    made = foolbox.attacks.L2PGD(abs_stepsize=alpha, steps=STEPS, random_start=False)
    return lambda images, labels: made.run(for_foolbox(model), images, labels, epsilon=L2_EPS)


def for_foolbox(model):
    import foolbox

    return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")


def for_art(model, shape=(3, 32, 32)):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=model(torch.zeros(1, *shape)).shape[1],
        clip_values=(0, 1),
        device_type="cpu",
    )


def l2_of_art(model, alpha):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    options = {"norm": 2, "eps": L2_EPS, "eps_step": alpha, "max_iter": STEPS, "verbose": False}
    made = ProjectedGradientDescentPyTorch(for_art(model), **options)
    return lambda images, labels: torch.from_numpy(made.generate(images.numpy(), labels.numpy()))


@pytest.mark.parametrize(
    ("module", "make"),
    [("torchattacks", l2_of_torchattacks), ("foolbox", l2_of_foolbox), ("art", l2_of_art)],
)
def test_pgd_in_l2_breaks_every_image_that_a_library_breaks(case, module, make):
    pytest.importorskip(module, reason=f"{module} is not installed; it is in the extra [bench]")
    theirs = make(case[0], L2_EPS / 4)(*case[1:])
    assert_no_weaker(case, theirs, "l2", L2_EPS)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_mifgsm_agrees(case, decay):
    reason = "torchattacks is not installed; it is in the extra [bench]"
    torchattacks = pytest.importorskip("torchattacks", reason=reason)
    model, images, labels = case
    eps, steps = 8 / 255, 5
    made = torchattacks.MIFGSM(model, eps=eps, alpha=eps / steps, steps=steps, decay=decay)
    theirs = made(images, labels)
    ours = mifgsm(model, images, labels, eps, steps=steps, decay=decay)
    assert float((ours - images).abs().max()) <= eps + 1e-6
    # A sign that rounding turns sends the pixel, and a little those around it, another way.
    assert float(((theirs - ours).abs() > 1e-6).float().mean()) <= 1e-3


# --- the shortest way out


def deepfool_of_foolbox(model, images, labels):
    import foolbox

    return foolbox.attacks.L2DeepFoolAttack().run(for_foolbox(model), images, labels)


def deepfool_of_art(model, images, labels, shape=(3, 32, 32), classes=10):
    from art.attacks.evasion import DeepFool

    # Its own overshoot is 1e-6, not the paper's 0.02.
    options = {"epsilon": 0.02, "nb_grads": classes, "max_iter": 20, "verbose": False}
    made = DeepFool(for_art(model, shape), batch_size=len(images), **options)
    return torch.from_numpy(made.generate(images.numpy()))


CW = {"searches": 4, "steps": 40, "rate": 0.003, "constant": 0.1}


def cw_of_foolbox(model, images, labels, options):
    import foolbox

    made = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=options["searches"],
        steps=options["steps"],
        stepsize=options["rate"],
        initial_const=options["constant"],
    )
    return made.run(for_foolbox(model), images, labels)


def cw_of_art(model, images, labels, options):
    from art.attacks.evasion import CarliniL2Method

    made = CarliniL2Method(  # gradient descent with a line search in the place of Adam
        for_art(model),
        binary_search_steps=options["searches"],
        max_iter=options["steps"] // 4,
        initial_const=options["constant"],
        batch_size=len(images),
        verbose=False,
    )
    return torch.from_numpy(made.generate(images.numpy(), labels.numpy()))


class Classes(torch.nn.Module):
    """A network with those of its logits that have a label: fewer gradients for ART's DeepFool."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[:, :10]


# How C&W is to search: the borders of the robust network are several times as far away.
NETWORKS = {"small": CW, "cnn-baseline": CW, "cnn-robust": CW | {"rate": 0.01, "constant": 1.0}}


@pytest.fixture(params=NETWORKS)
def nearby(request):
    """A small untrained or a shipped network, images that it gets right, and their labels."""
    if request.param == "small":
        model, (images, _) = make_small_cnn(), make_batch(16)
        return (model, images, balance(model, images)), NETWORKS[request.param]
    root = request.getfixturevalue("cifar10_root")
    path = files.shipped_checkpoints() / f"{request.param}-seed0.safetensors"
    model = Classes(checkpoints.load(path).model).eval()
    images, labels = (part[:20] for part in first_images(root))
    right = evaluation.holds(model, images, labels).nonzero()[:8, 0]
    return (model, images[right], labels[right]), NETWORKS[request.param]


@pytest.mark.parametrize(
    ("module", "theirs", "ours", "below", "above"),
    [
        # It takes its gradients at the end of the stretched walk, so its steps are other ones.
        ("foolbox", deepfool_of_foolbox, minimal.deepfool, 0.95, 1.05),
        ("art", deepfool_of_art, minimal.deepfool, 0.99, 1.02),
        ("foolbox", cw_of_foolbox, minimal.carlini_wagner, 0.95, 1.05),
        # Of ten steps: it is often longer, never much shorter.
        ("art", cw_of_art, minimal.carlini_wagner, 0.95, 2.0),
    ],
)
def test_shortest_ways_are_as_short_as_a_librarys(nearby, module, theirs, ours, below, above):
    pytest.importorskip(module, reason=f"{module} is not installed; it is in the extra [bench]")
    batch, options = nearby
    if ours is minimal.carlini_wagner:
        made = ours(*batch, **options), theirs(*batch, options)
    else:
        made = ours(*batch), theirs(*batch)
    mine, other = (minimal.distortion(*batch, one)["l2"] for one in made)
    assert bool(mine.isfinite().all())
    assert below < float((other / mine).median()) < above


def test_deepfool_of_art_measures_from_another_logit_where_it_looks_at_fewer_classes():
    pytest.importorskip("art", reason="art is not installed; it is in the extra [bench]")
    shape, image = (1, 3, 4), torch.full((1, 1, 3, 4), 0.5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3, 12))
        model[1].bias.copy_(torch.tensor([0.0, 0.3, 0.2]))
    batch = model, image, torch.tensor([1])
    lengths = {
        classes: [
            float((made - image).norm())
            for made in (
                deepfool_of_art(*batch, shape, classes),
                minimal.deepfool(*batch, classes=classes),
            )
        ]
        for classes in (2, 3)
    }
    shortest = 1.02 * 0.1 / 2**0.5  # to the border of classes 1 and 2
    assert lengths[3] == pytest.approx([shortest, shortest], rel=1e-3)
    # Class 1 is the first of the two that it looks at; it takes logit 0 for that of class 1.
    assert lengths[2] == pytest.approx([2 * shortest, shortest], rel=1e-3)


def test_carlini_wagner_needs_a_rate_that_is_small_beside_the_way():
    pytest.importorskip("foolbox", reason="foolbox is not installed; it is in the extra [bench]")
    torch.manual_seed(0)
    model, (images, _) = randomise_batch_norm(models.build("cnn")).eval(), make_batch(16)
    batch = model, images[:6], balance(model, images)[:6]
    patient = CW | {"rate": 0.0003}
    ways = {
        name: minimal.distortion(*batch, made)["l2"]
        for name, made in {
            "deepfool": minimal.deepfool(*batch),
            "patient": minimal.carlini_wagner(*batch, **patient),
            "foolbox": cw_of_foolbox(*batch, patient),
            "coarse": minimal.carlini_wagner(*batch, **CW),
        }.items()
    }
    # Logits of an untrained network are nearly equal: a border is nearer than Adam's first step,
    # which changes a grey value by half the rate.
    assert float(ways["deepfool"].median()) < 0.003 / 2 * 3072**0.5 / 4
    for name in ("deepfool", "foolbox"):
        assert 0.9 < float((ways[name] / ways["patient"]).median()) < 1.1
    assert float((ways["coarse"] / ways["patient"]).median()) > 1.4


def test_jsma_changes_as_many_values_as_torchattacks():
    reason = "torchattacks is not installed; it is in the extra [bench]"
    torchattacks = pytest.importorskip("torchattacks", reason=reason)
    model, images = make_small_cnn(), make_batch(16)[0]
    labels = balance(model, images)[:4]
    images, aim = images[:4], (labels + 1) % 10  # what it aims at
    theirs = torchattacks.JSMA(model, theta=1.0, gamma=0.145)(images, labels)
    ours = minimal.jsma(model, images, labels, targeted=aim)
    counts = [((made - images).abs() > 1e-6).flatten(1).sum(1) for made in (ours, theirs)]
    assert int((counts[0] == counts[1]).sum()) >= 3


def test_jsma_of_art_looks_at_the_targets_slopes_alone():
    pytest.importorskip("art", reason="art is not installed; it is in the extra [bench]")
    from art.attacks.evasion import SaliencyMapMethod

    model, image = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.zeros(12)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1, :3] = torch.tensor([3.0, 2.0, 1.0])  # of the target
        model[1].weight[0, :3] = torch.tensor([-1.0, 1.0, -3.0])  # of the other class
        model[1].bias.copy_(torch.tensor([1.0, 0.0]))
    image, zero = image.reshape(1, 1, 3, 4), torch.zeros(1, dtype=torch.int64)
    made = SaliencyMapMethod(for_art(model, (1, 3, 4)), verbose=False)
    theirs = made.generate(image.numpy(), (1 - zero).numpy())
    ours = minimal.jsma(model, image, zero, gamma=1.0, targeted=1 - zero)
    assert theirs.flatten().nonzero()[0].tolist() == [0, 1]  # the steepest two
    assert ours.flatten().nonzero()[:, 0].tolist() == [0, 2]  # 4 x 4, not 5 x 0


def test_certificates_agree_with_art(monkeypatch):
    pytest.importorskip("art", reason="art is not installed; it is in the extra [bench]")
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    from scipy.stats import beta

    def quantile(self, count, n):  # what ART asks of statsmodels, which it does not install
        return beta.ppf(self.alpha, count, n - count + 1) if count else 0.0

    monkeypatch.setattr(PyTorchRandomizedSmoothing, "_lower_confidence_bound", quantile)
    model, (images, _) = make_small_cnn(), make_batch(12)
    balance(model, images)
    about = {"loss": torch.nn.CrossEntropyLoss(), "input_shape": (3, 32, 32), "nb_classes": 10}
    noise = {"sample_size": 50, "scale": 0.1, "alpha": 0.001}
    theirs = PyTorchRandomizedSmoothing(model=model, **about, **noise)
    named, radii = map(torch.from_numpy, theirs.certify(images.numpy(), n=2_000))
    ours = proofs.certify(model, images, 0.1, n0=50, n=2_000)
    both = (ours.answers != proofs.ABSTAIN) & (named != -1)
    assert int(both.sum()) >= 4
    assert torch.equal(ours.answers[both], named[both])
    assert float((ours.radii - radii).abs().max()) < 0.02


class Unflattened(torch.nn.Module):
    """The layers of a network with its nn.Flatten, which ART's intervals do not know, as a call."""

    def __init__(self, network):
        super().__init__()
        self.first, self.relu, _, self.last = network

    def forward(self, x):
        return self.last(self.relu(self.first(x)).flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_interval_bounds_agree_with_art():
    pytest.importorskip("art", reason="art is not installed; it is in the extra [bench]")
    from art.estimators.certification.interval import PyTorchIBPClassifier

    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.nn.Linear(64, 5)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Flatten(), last)
    images = make_batch(6, shape=(3, 8, 8))[0]
    about = {"loss": torch.nn.CrossEntropyLoss(), "input_shape": (3, 8, 8), "nb_classes": 5}
    about |= {"model": Unflattened(copy.deepcopy(model)), "device_type": "cpu"}  # it sets hooks
    theirs = PyTorchIBPClassifier(**about)
    ends = theirs.predict_intervals(images.numpy(), bounds=0.05, limits=[0.0, 1.0])
    ours = torch.stack(proofs.interval_bounds(model, images, 0.05), 1)
    torch.testing.assert_close(ours, torch.from_numpy(ends).reshape(ours.shape).float())
