"""Everything follows the device: tried on one that is not there, and on CUDA where it is."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import as_checkpoint, balance, encoded, randomise_batch_norm, upload
from PIL import Image
from second_device import MixedDevicesError, SecondDevice, tensors_in
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from advlab import (
    adaptive,
    attacks,
    checkpoints,
    evaluation,
    forward,
    lab,
    minimal,
    models,
    plots,
    proofs,
    training,
    widgets,
)
from advlab.audit import CHECKLIST, Trial
from advlab.autoattack import auto_attack
from advlab.catalogue import ATTACKS
from advlab.data import DataSpec, ImageData, Split, to_float
from advlab.machine import pick_device
from advlab.recipes import ADVERSARIES, Recipe
from advlab.store import Store, Zoo
from advlab.training import AugmentedSet
from advlab.transforms import FGSMTransform

SPEC = DataSpec("noise", "Noise", (3, 16, 16), tuple("abcdefghij"))
TINY = Recipe("tiny", epochs=1, batch_size=12, optimiser="sgd", lr=0.01, average=0.9)
EPS = 0.02
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def refuse_cudnn(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fail where cuDNN would: it takes no gradients of a recurrent layer in eval mode."""
    needed = torch.is_grad_enabled() and inputs[0].requires_grad and not layer.training
    if inputs[0].device.type == "cuda" and needed and torch.backends.cudnn.enabled:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


def make_bench(device: str, folder: Path, n: int = 12) -> SimpleNamespace:
    """Return models and data on `device`; most labels are what the CNN answers."""
    generator, known = torch.Generator().manual_seed(0), []
    pixels = torch.randint(0, 256, (2 * n, *SPEC.shape), generator=generator, dtype=torch.uint8)
    for arch in ("cnn-lstm", "cnn"):
        model = models.build(arch, 0, SPEC.shape).eval()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            randomise_batch_norm(model)
        labels = balance(model, to_float(pixels)) % 10
        about = {"arch": arch, "train_eps": 0.0, "seed": 0, "shape": SPEC.shape}
        known.append(as_checkpoint(model, folder, **about))
        model.to(device)
    known[0].model.lstm.register_forward_pre_hook(refuse_cudnn)
    labels[::5] = 3
    near = ImageData(SPEC, Split(pixels, labels), Split(pixels[:n], labels[:n]))
    far, store = near.to(device), Store(folder / "kept")
    b = SimpleNamespace(near=near, data=far, known=known, folder=folder, store=store)
    b.x, b.y = far.test.batch(slice(None))
    b.hybrid, b.cnn, b.aims = known[0].model, known[1].model, (b.y + 1) % 10
    b.batch, b.signs = (b.hybrid, b.x, b.y), attacks.fgsm_direction(b.hybrid, b.x, b.y)
    return b


def images(b: SimpleNamespace) -> list[Any]:
    split, index = b.data.test, torch.tensor([1, 13])
    found = [to_float(split.images), *split.batch(slice(2)), *b.data.train.batch(index)]
    found += [split.first(3).images, *(part.images for part in training.hold_out(b.data.train))]
    flipped = training.flip_some(b.x, torch.Generator().manual_seed(0))
    both = AugmentedSet(split, b.signs, EPS).batch(index)
    flipped = training.crop_some(flipped, 1, torch.Generator().manual_seed(0))
    return [*found, *both, flipped, b.data.md5, b.data.test_md5]


def answers(b: SimpleNamespace) -> list[Any]:
    logits = forward.predict(b.hybrid, b.x)
    found = [logits, forward.evaluate(*b.batch), forward.holds(*b.batch)]
    found += [evaluation.confusion(b.y, b.aims, SPEC.classes), attacks.attack_loss(logits, b.y)]
    found += [training.measure_on_test(b.hybrid, split) for split in (b.near.test, b.data.test)]
    found += [adaptive.share_held(*b.batch, 2), adaptive.has_gradient(b.hybrid, b.x)]
    found += [adaptive.StraightThrough(torch.round)(b.x)]
    return [*found, training.measure_on_validation(b.hybrid, b.near.test, EPS)]


def one_step(b: SimpleNamespace) -> list[Tensor]:
    found = [attacks.input_gradient(*b.batch), attacks.perturb(b.x, b.signs, EPS)]
    found += [attacks.fgsm_direction(*b.batch, per_image_statistics=True)]
    found += [attacks.fgsm(*b.batch, EPS, per_image_statistics=own) for own in (False, True)]
    found += [attacks.fgsm(*b.batch, EPS, targeted=b.aims)]
    found += [attacks.fgsm(lambda x: b.hybrid(x), b.x, b.y, EPS)]
    transform = FGSMTransform(b.hybrid, EPS, p=0.5)
    return [*found, transform(b.x, b.y)[0], transform(b.x[0], int(b.y[0]))[0]]


def many_steps(b: SimpleNamespace) -> list[Tensor]:
    found = [attacks.bim(*b.batch, EPS, alpha=0.01, steps=2)]
    found += [attacks.rfgsm(*b.batch, EPS, alpha=EPS), attacks.mifgsm(*b.batch, EPS, steps=2)]
    ways = product(attacks.NORMS, attacks.LOSSES, (None, b.aims), (1, 2))
    for norm, loss, targeted, restarts in ways:
        options = {"norm": norm, "loss": loss, "targeted": targeted, "restarts": restarts}
        found.append(attacks.pgd(*b.batch, EPS, alpha=0.01, steps=2, **options))
    return found


def shortest(b: SimpleNamespace) -> list[Tensor]:
    found = [minimal.deepfool(*b.batch, steps=2)]
    for targeted in (None, b.aims):
        options = {"steps": 2, "searches": 2, "targeted": targeted}
        found.append(minimal.carlini_wagner(*b.batch, **options))
        for pairs in (False, True):
            options = {"gamma": 0.01, "pairs": pairs, "targeted": targeted}
            found.append(minimal.jsma(*b.batch, **options))
    return [*found, *minimal.distortion(*b.batch, found[0]).values()]


def proved(b: SimpleNamespace) -> list[Tensor]:
    votes = proofs.certify(b.hybrid, b.x, 0.1, n0=5, n=50)
    found = [votes.counts.tolist(), votes.hold(b.y, 0.01).tolist()]  # they are on the CPU
    found += proofs.interval_bounds(b.cnn, b.x, 1e-5)
    return [*found, proofs.worst_margins(b.cnn, b.x, b.y, 1e-5)]


def named(b: SimpleNamespace) -> list[Any]:
    found = [attack(*b.batch, EPS) for attack in ATTACKS.values()]
    for attack, source in (("fgsm", b.known[1]), ("noise", None), ("rfgsm", None)):
        options = {"attack": attack, "source": source, "store": b.store}
        found += [evaluation.accuracy_table(b.known, b.data, [0, EPS], **options)]
        found += [evaluation.minimal_eps(*b.batch, attack=attack, largest=2)]
    return found


def audit(b: SimpleNamespace) -> list[Any]:
    trial = Trial(*b.batch, source=b.cnn, eps=EPS, classes=64)
    return [*(judge(trial) for _, judge in CHECKLIST), trial.checklist(), trial.accuracies()]


def authors_code(b: SimpleNamespace) -> Tensor:
    pytest.importorskip("pyautoattack")
    return auto_attack(*b.batch, EPS, queries=20, store=b.store)


def train(b: SimpleNamespace, precision: str = "float32") -> list[Tensor]:
    found = []
    for adversary in ADVERSARIES:
        model = models.build("cnn-lstm", 0, SPEC.shape).to(b.x.device)
        model.lstm.register_forward_pre_hook(refuse_cudnn)
        recipe = replace(TINY, adversary=adversary, eps=EPS, alpha=EPS, steps=2,
                         sigma=EPS if adversary == "noise" else 0.0)  # fmt: skip
        options = {"validation": b.data.test, "precision": precision, "test": b.near.test}
        data = b.data.train if recipe.on_the_fly else b.near.train
        training.fit(model, data, recipe, state_path=b.folder / "state", **options)
        found += model.state_dict().values()
        if recipe.on_the_fly:
            again = torch.Generator().manual_seed(0)
            found.append(training.attack_batch(model.train(), b.x, b.y, recipe, again))
    return found


def zoo(b: SimpleNamespace) -> list[Tensor]:
    found = Zoo(b.data, TINY, 0, b.folder / "zoo", progress=False)
    weights = found.get("cnn", EPS).model.state_dict()
    return [found.directions("cnn"), *weights.values()]


def saved(b: SimpleNamespace) -> list[Tensor]:
    path = b.folder / "model.safetensors"
    checkpoints.save(b.hybrid, b.known[0].metadata, path)
    again = (checkpoints.load(path).model, checkpoints.load_weights(path).model)
    return [tensor for model in again for tensor in model.state_dict().values()]


def explore(b: SimpleNamespace) -> list[Any]:
    both, found = {"a": b.hybrid, "b": b.cnn}, []
    explorer = widgets.AttackExplorer(both, b.data)
    for explorer.attack.value in widgets.CHOICES:
        found += [explorer.outcome.attacked, explorer.message.value]
    explorer.random.click()
    explorer.kind.value = int(b.y[1])
    upload(explorer, encoded(Image.new("RGB", (20, 20), "red")))
    own = widgets.attack_one(both, "b", b.x[0], int(b.y[0]), "pgd", EPS, steps=2)
    found += [explorer.outcome.attacked, explorer.message.value, own.attacked, own.before]
    plots.use_style()
    figures = [plots.fgsm_equation(b.x[0], b.signs[0], b.x[1], EPS, "abc"), explorer.figure()]
    return [*found, [len(figure.axes) for figure in (*figures, plots.image_grid(b.x))]]


ON_CPU = (saved, explore)
PARTS = (images, answers, one_step, many_steps, shortest, proved, named, audit, authors_code)
PARTS += (train, zoo, *ON_CPU)


@pytest.fixture(autouse=True)
def without_a_driver(monkeypatch):
    def thread(target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> SimpleNamespace:
        # One that ends before it is left: the second device holds for one thread.
        return SimpleNamespace(start=lambda: target(*args), join=lambda: None)

    monkeypatch.setattr(widgets.threading, "Thread", thread)
    for module in ("store", "training"):
        monkeypatch.setattr(f"advlab.{module}.has_fast_bf16", lambda device: False)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)


def assert_same(found: Any, wanted: Any) -> None:
    """Assert that two results, of any kind, are the same but for the last bits."""
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(one, other)
        elif isinstance(one, Tensor):
            torch.testing.assert_close(one.cpu(), other)
        else:
            assert one == pytest.approx(other)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("part", PARTS)
def test_everything_follows_the_device(part, kind, tmp_path):
    torch.manual_seed(0)
    wanted = part(make_bench("cpu", tmp_path / "cpu"))
    with SecondDevice(kind) as second:
        torch.manual_seed(0)
        found = part(make_bench(kind, tmp_path / kind))
        where = torch.device("cpu") if part in ON_CPU else second.device
        assert all(tensor.device == where for tensor in tensors_in(found))
        assert_same(found, wanted)


def test_the_second_device_refuses_what_a_gpu_would():
    def planted(x: Tensor) -> Tensor:
        return x + torch.zeros(len(x), 1)

    with SecondDevice("cuda") as second:
        x = torch.rand(2, 3).to(second.device)
        assert (x[0] * torch.tensor(2.0)).device == torch.ones(3, device="cuda").device == x.device
        assert planted(x.cpu()).device == torch.device("cpu")
        with pytest.raises(MixedDevicesError, match=r"aten\.add\.Tensor got tensors of cpu and cu"):
            planted(x)
        with pytest.raises(MixedDevicesError, match=r"aten\.add_"):
            torch.zeros(()).add_(x.sum())
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    with SecondDevice("mps"), pytest.raises(TypeError, match="float64"):
        torch.ones(2, device="mps").double()


def test_every_public_function_of_tensors_is_tried():
    inside = {"check_batch", "check_device", "check_outputs", "check_targets", "eval_mode", "key"}
    inside |= {"gradient_mode", "recurrent_gradients", "per_image_statistics_mode", "load_into"}
    inside |= {"fastest_layout", "as_picture", "show_image", "amplified", "audit", "as_bytes"}
    inside |= {"answers_vary", "ask", "gradient_of", "check_images", "check_labels", "modules_of"}
    inside |= {"sharing", "craft"}
    on_cpu, written = {"read_state", "read_tensors", "read_upload"}, Path(__file__).read_text()
    for name in ("adaptive", "attacks", "audit", "autoattack", "catalogue", "checkpoints", "data",
                 "evaluation", "forward", "minimal", "plots", "proofs", "store", "training",
                 "transforms",
                 "widgets"):  # fmt: skip
        module = import_module(f"advlab.{name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "Tensor" in str(inspect.signature(function)):
                assert name in inside | on_cpu or f"{name}(" in written, name


def test_a_lesson_follows_its_device(monkeypatch):
    with SecondDevice("cuda") as second:
        monkeypatch.setattr(lab, "pick_device", {"cuda": second.device}.get)
        lesson = lab.start("quick", "shapes10", device="cuda")
        assert lesson.device == lesson.zoo.data.test.labels.device == second.device
        assert "device cuda" in str(lesson)


def test_on_cuda_float32_is_not_rounded_and_settings_are_put_back(tmp_path):
    cudnn, seen = torch.backends.cudnn, []
    before = cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.enabled
    with SecondDevice("cuda"):
        b = make_bench("cuda", tmp_path)
        for layer in (b.hybrid.cnn, b.cnn.network):
            layer.register_forward_pre_hook(
                lambda *_: seen.append((cudnn.conv.fp32_precision, cudnn.enabled))
            )
        forward.predict(b.hybrid, b.x)
        attacks.fgsm(b.hybrid, b.x, b.y, EPS)
        attacks.fgsm(b.cnn, b.x, b.y, EPS)
    assert seen == [("ieee", True), ("ieee", False), ("ieee", True)]
    assert (cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.enabled) == before


def test_a_gpu_keeps_its_random_state(monkeypatch, tmp_path):
    seeded, kept = [], []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.append(state))
    models.build("cnn")
    assert not seeded
    with SecondDevice("cuda"):
        authors_code(make_bench("cuda", tmp_path))
    assert seeded
    assert kept == ["state of cuda:0"]


@pytest.mark.parametrize(("gpus", "mps", "best"), [(0, 0, "cpu"), (0, 1, "mps"), (2, 1, "cuda")])
def test_pick_device(gpus, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pick_device().type == pick_device("auto").type == best
    for there in ("cpu", *(f"cuda:{k}" for k in range(gpus))):
        assert pick_device(there) == torch.device(there)
    for absent in ("gpu", f"cuda:{gpus}", "cuda:x", "mps:1"):
        with pytest.raises(ValueError, match=f"device '{absent}' is not .*; choose auto, or cpu"):
            pick_device(absent)


@needs_cuda
@pytest.mark.parametrize("part", PARTS)
def test_cuda_runs_everything(part, tmp_path):
    b = make_bench("cuda", tmp_path)
    where = torch.device("cpu") if part in ON_CPU else b.x.device
    assert all(tensor.device == where for tensor in tensors_in(part(b)))


@needs_cuda
def test_cuda_agrees_with_the_cpu(tmp_path):
    near, far = (make_bench(device, tmp_path / device, 500) for device in ("cpu", "cuda"))
    assert_same([images(far)[-3:], saved(far)], [images(near)[-3:], saved(near)])
    for of in (lambda b: (b.hybrid, b.x, b.y), lambda b: (b.cnn, b.x, b.y)):
        signs = [attacks.fgsm_direction(*of(b)).cpu() for b in (near, far)]
        assert (signs[0] != signs[1]).float().mean() < 1e-3
        for attack in ATTACKS.values():
            held = [forward.holds(of(b)[0], attack(*of(b), EPS), b.y).sum() for b in (near, far)]
            assert abs(int(held[0]) - int(held[1])) <= 5, attack.name


@needs_cuda
def test_cuda_trains_in_bfloat16(tmp_path):
    assert all(
        tensor.isfinite().all() for tensor in train(make_bench("cuda", tmp_path), "bfloat16")
    )
