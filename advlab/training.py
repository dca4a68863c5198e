"""Training: one loop for every model.

The loop does no per-image Python work: a batch is cut from tensors in memory, flipped and perturbed
as a whole. On CPUs with bfloat16 units the forward and backward passes run in bfloat16 (weights,
optimiser and loss stay in float32); everything that is reported is evaluated in float32.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from advlab import files
from advlab.attacks import fgsm, perturb, pgd
from advlab.data import Split, check_integer, check_name
from advlab.forward import eval_mode, evaluate, recurrent_gradients
from advlab.machine import free_threads, has_fast_bf16, progress_bar, torch_threads
from advlab.models import fastest_layout
from advlab.recipes import Recipe

History = list[dict[str, float]]


class TrainingSet(Protocol):
    """What `fit` trains on: a length, and batches by index."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return float images in [0, 1] and labels at `index`."""
        ...


@dataclass(frozen=True)
class AugmentedSet:
    """The paper's augmented set: N originals, then their N FGSM images (paper, section 1.4).

    The attacked images are never stored: the direction (int8) is, and one addition makes the batch.

    Args:
        originals: The training split.
        directions: (N, C, H, W) int8, from `attacks.fgsm_direction`.
        eps: Training eps, from 0 to 1.
    """

    originals: Split
    directions: Tensor
    eps: float

    def __post_init__(self) -> None:
        if self.directions.shape != self.originals.images.shape:
            raise ValueError(
                f"directions {tuple(self.directions.shape)} do not belong to images "
                f"{tuple(self.originals.images.shape)}"
            )

    def __len__(self) -> int:
        return 2 * len(self.originals)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at `index` (those from N on are attacked) and their labels."""
        index = index.to(self.directions.device)
        original = index % len(self.originals)
        images, labels = self.originals.batch(original)
        attacked = index >= len(self.originals)
        signs = self.directions.index_select(0, original).mul_(attacked[:, None, None, None])
        return perturb(images, signs, self.eps), labels


def device_of(model: nn.Module) -> torch.device:
    """Return where the weights of `model` are."""
    return next(model.parameters()).device


def flip_some(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of `images` (N, C, H, W) left-right with probability 1/2."""
    drawn = torch.rand(len(images), generator=generator, dtype=torch.float32)
    chosen = (drawn < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def crop_some(images: Tensor, border: int, generator: torch.Generator) -> Tensor:
    """Move each of `images` (N, C, H, W) by up to `border` pixels up or down, left or right.

    That is: pad all sides with zeros, and cut a piece of the old size out at a random place.
    """
    n, _, height, width = images.shape
    up, left = torch.randint(2 * border + 1, (2, n, 1), generator=generator)
    rows, columns = up + torch.arange(height), left + torch.arange(width)
    place = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    padded = F.pad(images, [border] * 4).permute(0, 2, 3, 1)
    return padded[tuple(part.to(images.device) for part in place)].permute(0, 3, 1, 2)


def measure_on_test(model: nn.Module, test: Split) -> dict[str, float]:
    """Return test_loss (mean cross entropy) and test_accuracy of `model` in eval mode."""
    device, correct, loss = device_of(model), 0, 0.0
    for start in range(0, len(test), 1_000):  # a thousand at a time: all as floats fill 123 MB
        images, labels = (t.to(device) for t in test.batch(slice(start, start + 1_000)))
        right, mean = evaluate(model, images, labels)
        correct, loss = correct + right, loss + mean * len(labels)
    return {"test_loss": loss / len(test), "test_accuracy": correct / len(test)}


def _optimiser(model: nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    options["fused"] = fused
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)
    return torch.optim.Adam(model.parameters(), **options)


def _schedule(optimiser: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    if recipe.one_cycle:
        return OneCycleLR(
            optimiser,
            recipe.lr,
            total_steps=steps,
            div_factor=10,
            final_div_factor=0.1 / recipe.final_lr,
            cycle_momentum=False,
        )
    return ConstantLR(optimiser, factor=1)


def attack_batch(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """Attack a training batch as `recipe.adversary` does, with the model as it is at this step.

    The mode of the model is that of the sources: training mode (batch statistics) for "fgsm",
    "rs-fgsm" and "pgd" (Wong et al. 2020; Rice et al. 2020, 2002.11569), eval mode for "trades".
    Every image takes all steps and its last point is kept; nobody leaves the batch.

    Args:
        model: In training mode.
        images, labels: As in `attacks.input_gradient`.
        recipe: Names adversary, eps, alpha, steps.
        generator: Of the random start.

    Returns:
        Attacked images, like `images`; no gradient flows through them.
    """
    eps = recipe.eps
    x = images
    if recipe.adversary != "fgsm":
        noise = torch.rand(images.shape, generator=generator, dtype=torch.float32)
        x = torch.add(images, noise.to(images.device).mul_(2).sub_(1), alpha=eps).clamp_(0, 1)
    trades = recipe.adversary == "trades"
    with ExitStack() as stack:
        if trades:
            stack.enter_context(eval_mode(model))
            stack.enter_context(recurrent_gradients(model, images.device))
        with torch.no_grad():
            answer = model(images).float().softmax(1) if trades else None
        for _ in range(recipe.steps):
            x = x.detach().contiguous(memory_format=fastest_layout(model)).requires_grad_()
            logits = model(x).float()
            if answer is not None:
                loss = F.kl_div(F.log_softmax(logits, 1), answer, reduction="sum")
            else:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            gradient = torch.autograd.grad(loss, x)[0]
            x = torch.add(x.detach(), gradient.sign(), alpha=recipe.alpha)
            x = x.clamp_(images - eps, images + eps).clamp_(0, 1)
    return x


def _soft_labels(averaged: nn.Module, images: Tensor, labels: Tensor, soft: float) -> Tensor:
    """Return the labels (N, classes) of `Recipe.soft`, float32: true class and averaged answer."""
    with torch.no_grad(), eval_mode(averaged):
        answer = averaged(images).float().softmax(1)
    return F.one_hot(labels, answer.shape[1]).float().lerp(answer, soft)


def _loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    averaged: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch and the logits by which training accuracy is counted."""
    if recipe.sigma:
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
        images = torch.add(images, noise.to(images.device), alpha=recipe.sigma)
    if not recipe.on_the_fly:
        logits = model(images).float()
        return F.cross_entropy(logits, labels), logits
    attacked = attack_batch(model, images, labels, recipe, generator)
    if recipe.adversary != "trades":
        logits = model(attacked).float()
        target = labels
        if averaged is not None and recipe.soft:
            target = _soft_labels(averaged, images, labels, recipe.soft)
        return F.cross_entropy(logits, target), logits
    clean, logits = model(torch.cat([images, attacked])).float().chunk(2)
    gap = F.kl_div(
        F.log_softmax(logits, 1), F.log_softmax(clean, 1), reduction="batchmean", log_target=True
    )
    return F.cross_entropy(clean, labels) + recipe.beta * gap, logits


def _average(decay: float, averaged: Tensor, now: Tensor, step: Tensor) -> Tensor:
    """Return the running average of a weight or buffer after `step` updates."""
    if not now.is_floating_point():  # batch norm counts its batches
        return now
    return averaged.lerp(now, 1 - min(decay, float((1 + step) / (10 + step))))


def _identify(model: nn.Module, data: TrainingSet, recipe: Recipe, seed: int) -> str:
    """Return a text that differs for every other training: model, start, data, recipe, seed."""
    digest = hashlib.md5(usedforsecurity=False)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().data)
    for tensor in data.batch(torch.tensor([0, len(data) // 2, len(data) - 1])):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return json.dumps([asdict(recipe), seed, len(data), repr(model), digest.hexdigest()])


def measure_on_validation(
    model: nn.Module, validation: Split, eps: float, seed: int = 0
) -> dict[str, float]:
    """Return val_accuracy, val_fgsm_accuracy and val_pgd_accuracy (10 steps), fractions.

    Args:
        model: In any mode; measured in eval mode, float32.
        validation: Images that are not trained on.
        eps: Size of the attacks.
        seed: Of PGD's random start.
    """
    images, labels = (t.to(device_of(model)) for t in validation.batch(slice(None)))
    shown = {
        "val_accuracy": images,
        "val_fgsm_accuracy": fgsm(model, images, labels, eps),
        "val_pgd_accuracy": pgd(model, images, labels, eps, alpha=eps / 4, steps=10, seed=seed),
    }
    return {name: evaluate(model, x, labels)[0] / len(labels) for name, x in shown.items()}


def hold_out(train: Split) -> tuple[Split, Split]:
    """Return what to train on, and the images by which trainings are compared.

    These are the last 5,000, or of a small set the last tenth.

    Raises:
        ValueError: if there are fewer than ten images.
    """
    if len(train) < 10:
        raise ValueError(f"there are {len(train)} training images; at least 10 are needed")
    held = min(5_000, len(train) // 10)
    rest = train.first(len(train) - held)
    return rest, Split(train.images[len(rest) :], train.labels[len(rest) :])


def overfitted_catastrophically(history: History) -> int | None:
    """Return the first epoch whose PGD accuracy gives the alarm, or None.

    It does under half of the FGSM accuracy of the same epoch, or of the best PGD accuracy so far.
    That is how catastrophic overfitting shows (Wong et al. 2020): within an epoch the model learns
    to resist the one step that it is trained with, and nothing else.
    """
    best = 0.0
    for row in history:
        best = max(best, row["val_pgd_accuracy"])
        if row["val_pgd_accuracy"] < max(best, row["val_fgsm_accuracy"]) / 2:
            return int(row["epoch"])
    return None


class _Run:
    """A training on its way: what changes from step to step, and what is kept of each epoch."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainingSet,
        recipe: Recipe,
        seed: int,
        precision: str,
        state_path: Path | None,
    ) -> None:
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.device = device_of(model)
        check_name("precision", precision, ("auto", "bfloat16", "float32"))
        self.half = has_fast_bf16(self.device) if precision == "auto" else precision == "bfloat16"
        model.to(memory_format=fastest_layout(model))  # type: ignore[call-overload]
        if len(data) == 0:
            raise ValueError("there are no images to train on")
        self.steps = len(self._batches(torch.arange(len(data))))  # of an epoch
        self.optimiser = _optimiser(model, recipe, fused=self.device.type != "mps")
        self.schedule = _schedule(self.optimiser, recipe, recipe.epochs * self.steps)
        self.parts: dict[str, Any] = {
            "model": model,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
        }
        self.averaged = None
        if recipe.average:
            rule = partial(_average, recipe.average)
            self.averaged = AveragedModel(model, avg_fn=rule, use_buffers=True)
            self.parts["averaged"] = self.averaged
        self.history: History = []
        self.best: dict[str, Any] = {"score": -1.0, "weights": None}
        self.state_path = state_path
        if state_path:
            self.identity = _identify(model, data, recipe, seed)
            self._restore(state_path)

    @property
    def judged(self) -> nn.Module:
        """The model whose figures count: the average of the weights, where there is one."""
        return self.averaged.module if self.averaged else self.model

    def epoch(self, on_step: Callable[[], None]) -> dict[str, float]:
        """Train for one epoch; return its exact mean loss and accuracy over the images seen."""
        number, size = len(self.history), len(self.data)
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        batches = self._batches(torch.randperm(size, generator=generator))
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float32)
        correct = torch.zeros((), device=self.device, dtype=torch.int64)
        self.model.train()
        start = time.perf_counter()
        for index in batches:
            loss, right = self._step(index, generator)
            if not loss.isfinite():
                raise RuntimeError(
                    f"epoch {number + 1}: the loss is {float(loss)}, and no later step would mend "
                    f"it. Nothing of this epoch was saved. Lower the learning rate "
                    f"({self.recipe.lr:g}), or train with precision='float32'"
                )
            loss_sum += loss * len(index)
            correct += right
            on_step()
        found = {"train_loss": float(loss_sum) / size, "train_accuracy": int(correct) / size}
        seconds = time.perf_counter() - start
        rate = {"seconds": seconds, "images_per_second": size / seconds}
        return {"epoch": number + 1, **found, **rate}

    def _batches(self, order: Tensor) -> list[Tensor]:
        """Cut an order into batches; a last one of a single image joins the one before.

        Batch norm has no spread of one image's features to divide by.
        """
        *batches, last = order.split(self.recipe.batch_size)
        if batches and len(last) == 1 < self.recipe.batch_size:
            last = torch.cat([batches.pop(), last])
        return [*batches, last]

    def _step(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Take one step on the images at `index`; return their mean loss and how many are right."""
        images, labels = self.data.batch(index)
        if self.recipe.flip:
            images = flip_some(images, generator)
        if self.recipe.crop:
            images = crop_some(images, self.recipe.crop, generator)
        images = images.to(self.device, memory_format=fastest_layout(self.model))
        labels = labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            now = self.recipe.at_step(self.schedule.last_epoch, self.recipe.epochs * self.steps)
            averaged = self.averaged.module if self.averaged else None
            loss, logits = _loss(self.model, images, labels, now, generator, averaged)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def keep_if_best(self, score: float) -> None:
        """Remember the weights if they have the highest score so far."""
        if score > self.best["score"]:
            weights = {name: t.clone() for name, t in self.judged.state_dict().items()}
            self.best = {"score": score, "weights": weights}

    def save(self) -> None:
        """Write all that is needed to go on after this epoch, where a state is kept."""
        if self.state_path:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"identity": self.identity, "history": self.history, "best": self.best}
            content = io.BytesIO()
            torch.save(state, content)
            files.write_bytes(self.state_path, content.getvalue())

    def _restore(self, path: Path) -> None:
        """Go back to where `save` was called, if it was for this training."""
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:
            raise ValueError(f"{path} is damaged; delete it to train from the start") from error
        if found == self.identity:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.history, self.best = state["history"], state["best"]

    def finish(self) -> History:
        """Give the model its final weights, in eval mode, and return the history."""
        self.model.load_state_dict(self.best["weights"] or self.judged.state_dict())
        self.model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        if self.state_path:
            self.state_path.unlink(missing_ok=True)
        return self.history


def fit(
    model: nn.Module,
    data: TrainingSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    test: Split | None = None,
    validation: Split | None = None,
    precision: str = "auto",
    threads: int | None = None,
    state_path: Path | None = None,
    progress: str | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train `model` in place by `recipe`, on the device where it is.

    The order of the images, the flips and the random starts of an epoch depend on `seed` and the
    epoch's number alone, so a training that was killed goes on from its last whole epoch to the
    same weights.

    Eleven parameters: the first four and `validation` decide the result, the others how it is
    computed, watched and kept.

    Args:
        model: The model; trained in place, left in eval mode.
        data: What to train on.
        recipe: How.
        seed: Order of images, flips and random starts.
        test: Images for the learning curve; they decide nothing.
        validation: Images that are not trained on, attacked after each epoch. With
            `recipe.early_stopping` the weights of the epoch that is best under PGD-10 are the
            result (Rice et al. 2020, 2002.11569).
        precision: Of the forward and backward passes: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device computes it in hardware.
        threads: Torch's own, for the training alone; None: `machine.free_threads`. Sums are rounded
            otherwise by another number of them, so for the same weights to the last bit give one.
        state_path: File for the state after each epoch; removed at the end. None keeps none.
        progress: Label of the tqdm bar; None shows no bar.
        on_epoch: Called with each epoch's figures.

    Returns:
        One dict per epoch: epoch, train_loss, train_accuracy, seconds (of training alone) and
        images_per_second; what `measure_on_test` and `measure_on_validation` return, if asked for.

    Raises:
        ValueError: if `state_path` is damaged, `data` is empty, there is no such precision, or
            `threads` is below 1.
        RuntimeError: at the first loss that is no finite number; nothing of its epoch is
            saved.
    """
    count = free_threads() if threads is None else check_integer("threads", threads, 1)
    run = _Run(model, data, recipe, seed, precision, state_path)
    total = recipe.epochs * run.steps
    with torch_threads(count), progress_bar(progress, total, "step") as bar:
        bar.update(len(run.history) * run.steps)
        while len(run.history) < recipe.epochs:
            figures = run.epoch(bar.update)
            if test is not None:
                figures |= measure_on_test(run.judged, test)
            if validation is not None:
                figures |= measure_on_validation(run.judged, validation, recipe.eps, seed)
                if recipe.early_stopping:
                    run.keep_if_best(figures["val_pgd_accuracy"])
            run.history.append(figures)
            bar.set_postfix(accuracy=f"{figures['train_accuracy']:.3f}")
            if on_epoch:
                on_epoch(figures)
            run.save()
    return run.finish()
