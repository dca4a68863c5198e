"""What the benchmark compares: training, crafting, evaluating, and every attack of the catalogue.

Each part returns rows. `rounds` is that of `measure.side_by_side`, `n` the images of one call.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset, TensorDataset

from advlab import models, paper
from advlab.attacks import fgsm, fgsm_direction, perturb
from advlab.bench import paper_way
from advlab.bench.ceiling import PRECISIONS, highest_rate, multiply_adds
from advlab.bench.measure import PAPERS, Row, Way, check_equal, compare, once, side_by_side, to_rows
from advlab.catalogue import ATTACKS
from advlab.checkpoints import Checkpoint
from advlab.data import ImageData, Split
from advlab.evaluation import accuracy_table
from advlab.machine import cores, threads
from advlab.recipes import PAPER, Recipe
from advlab.training import fit
from advlab.upkeep.processes import KEEP_MEMORY, environment

EPS = 8 / 255
TABLE = "table of 2 models x 6 eps"
# Operators by what they belong to, as the profiler calls them.
OPERATORS = {
    "convolutions": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("aten::clamp_min", "aten::threshold_backward"),
    "optimiser": ("fused_adam", "Optimizer"),
    "all the rest": ("",),
}
EPOCHS = PAPER.epochs  # each of which crafted anew


def new_model(arch: str, images: ImageData) -> nn.Module:
    """Return a new model of architecture `arch` for these images."""
    return models.build(arch, 0, images.shape, len(images.classes))


def machine_part(rounds: int) -> list[Row]:
    """Measure what the machine can do: matrix products and the models' convolutions."""
    rows, unit = [], "billion multiply-adds/s"
    stack = nn.Sequential(*models.convolutions())
    work = 3 * multiply_adds(stack) / 1e9
    for precision in PRECISIONS:
        a = torch.randn(2048, 2048).to(getattr(torch, precision))
        square = {f"2,048 x 2,048, {precision}": Way(partial(torch.mm, a, a), 2048**3 / 1e9)}
        rows += compare("ceiling", "matrix product", square, rounds, unit)
        for size in (64, 128):
            rate = highest_rate(stack, models.CIFAR_SHAPE, "train", size, precision)
            note = f"forward and both gradients: {rate:,.0f} images/s at most"
            way = f"batch {size}, {precision}"
            rows.append(once("ceiling", "convolutions", way, work * rate, unit, note=note))
    return rows


# --- training


def _train(model: nn.Module, split: Split, batch: int, precision: str) -> None:
    recipe = Recipe("bench", 1, batch, flip=False)
    # Not as many as are free: looking for them takes 0.2 s, and this is under a second of training.
    fit(deepcopy(model), split, recipe, precision=precision, threads=threads())


def _train_papers_way(model: nn.Module, split: Split) -> None:
    paper_way.train_steps(deepcopy(model), paper_way.shuffled(split), lr=1e-3)


def _train_plainly(model: nn.Module, split: Split) -> None:
    """Train as most people would: tensors, PyTorch's loader, a plain loop in float32."""
    model = deepcopy(model).train()
    loader = DataLoader(TensorDataset(*split.batch(slice(None))), batch_size=64, shuffle=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, labels in loader:
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()


def on_every_core(batch: int) -> str:
    """Return what the fastest way to train several models is called, by its batch size."""
    return f"batch {batch}, {PRECISIONS[-1]}, one process per core"


def _one_process_per_core() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(cores(), get_context("spawn"), torch.set_num_threads, (1,))


def _train_on_every_core(
    pool: ProcessPoolExecutor, variables: Mapping[str, str | None], *arguments: Any
) -> None:
    with environment(**variables):  # the first call starts the processes
        for job in [pool.submit(_train, *arguments) for _ in range(cores())]:
            job.result()


def training_part(images: ImageData, rounds: int, n: int = 1_920) -> list[Row]:
    """Measure training steps of both architectures: batch sizes, precisions, processes."""
    split, rows, best = images.train.first(n), [], PRECISIONS[-1]
    papers = "torchvision data set, DataLoader, float32, batch 64"
    plain = "TensorDataset, DataLoader, float32, batch 64"
    fastest = f"batch 64, {best}"
    for arch in ("cnn", "cnn-lstm"):
        model = new_model(arch, images)
        ways = {
            PAPERS: Way(partial(_train_papers_way, model, split), n, note=papers),
            "plain PyTorch": Way(partial(_train_plainly, model, split), n, note=plain),
        }
        for precision in PRECISIONS:
            for size in (64, 128):
                limit = highest_rate(model, images.shape, "train", size, precision)
                call = partial(_train, model, split, size, precision)
                ways[f"batch {size}, {precision}"] = Way(call, n, limit)
        if arch == "cnn":
            ways[fastest] = replace(ways[fastest], target=2.2)
        seconds = side_by_side(ways, rounds)
        # On their own: while workers are alive, even asleep, training in this process is slower.
        with _one_process_per_core() as keeping, _one_process_per_core() as returning:
            kept = partial(_train_on_every_core, keeping, KEEP_MEMORY, model, split)
            given_back = dict.fromkeys(KEEP_MEMORY)
            returned = partial(_train_on_every_core, returning, given_back, model, split)
            calls = {
                on_every_core(64): partial(kept, 64, best),
                on_every_core(128): partial(kept, 128, best),
                f"{on_every_core(64)}, memory given back": partial(returned, 64, best),
            }
            together = {name: Way(call, n * cores()) for name, call in calls.items()}
            seconds |= side_by_side(together, rounds)
        rows += to_rows("training", arch, ways | together, seconds, against=PAPERS)
    share = next(row.of_ceiling for row in rows if (row.what, row.way) == ("cnn", fastest))
    note = f"of what the convolutions alone reach in {best}; the rest: see the operators below"
    what = "cnn, share of the convolution ceiling"
    reached = once("training", what, fastest, 100 * share, "%", of_ceiling=share, note=note)
    return [*rows, reached]


def profile_part(images: ImageData, n: int = 1_920) -> list[Row]:
    """Measure on what a training step of the CNN spends its time, operator by operator."""
    model, split = new_model("cnn", images), images.train.first(n)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        _train(model, split, 64, PRECISIONS[-1])
    spent = dict.fromkeys(OPERATORS, 0.0)
    for event in watched.key_averages():
        kind = next(k for k, names in OPERATORS.items() if any(n in event.key for n in names))
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values()) / 100
    task = f"cnn, batch 64, {PRECISIONS[-1]}"
    return [once("a training step's time", task, kind, spent[kind] / whole, "%") for kind in spent]


# --- crafting


def _craft_papers_way(model: nn.Module, split: Split) -> list[Tensor]:
    source = deepcopy(model)  # crafting changes the model that it uses
    attacked = paper_way.Attacked(paper_way.Pictures(split), source, EPS)
    return [attacked[i][0] for i in range(len(split))]


def _craft_for(model: nn.Module, split: Split, eps: Sequence[float]) -> None:
    """Craft once, then make the attacked images of every training eps and epoch, as `fit` does."""
    direction = fgsm_direction(model, *split.batch(slice(None)), per_image_statistics=True)
    for one in eps:
        for _ in range(EPOCHS):
            for index in torch.arange(len(split)).split(64):
                perturb(split.batch(index)[0], direction.index_select(0, index), one)


def crafting_part(images: ImageData, source: Checkpoint, rounds: int, n: int = 1_000) -> list[Row]:
    """Measure crafting FGSM images, one direction and for k training eps and ten epochs.

    Args:
        images: Data; the first `n` training images are used, 48 of them for the paper's way.
        source: A baseline.

    Raises:
        RuntimeError: if batched crafting makes other images than the paper's way.
    """
    model, arch = source.model, source.metadata["arch"]
    few, many = images.train.first(48), images.train.first(n)
    papers = partial(_craft_papers_way, model, few)
    ours = fgsm(model, *few.batch(slice(None)), EPS, per_image_statistics=True)
    check_equal("crafting", torch.stack(papers()), ours)
    limit = highest_rate(model, images.shape, "craft")
    craft = partial(fgsm_direction, model, *many.batch(slice(None)))
    goals = (6.0, 9.0) if arch == "cnn" else (math.nan, math.nan)
    ways = {
        PAPERS: Way(papers, len(few), note="one image at a time, training mode"),
        "batched, per-image statistics": Way(
            partial(craft, per_image_statistics=True), n, limit, target=goals[0]
        ),
        "batched, running statistics": Way(craft, n, limit, target=goals[1]),
    }
    for_eps = {
        f"{k} eps": Way(partial(_craft_for, model, many, paper.SWEEP_TRAIN_EPS[1 : 1 + k]), n)
        for k in (1, 4, 8)
    }
    seconds = side_by_side(ways | for_eps, rounds)
    rows = to_rows("crafting", f"one direction, {arch}", ways, seconds, against=PAPERS)
    return rows + _rows_for_eps(arch, for_eps | {PAPERS: ways[PAPERS]}, seconds)


def _rows_for_eps(arch: str, ways: dict[str, Way], seconds: dict[str, list[float]]) -> list[Row]:
    """Return the rows of crafting for several eps, as if for all 50,000 images and ten epochs."""
    ours, papers = "one direction, added in the batch", ways.pop(PAPERS)
    more = median(seconds["8 eps"]) / median(seconds["1 eps"])
    what = f"8 eps against 1, {EPOCHS} epochs, {arch}"
    goal = {"target": 1.5, "target_of": "at most"}
    rows = [once("crafting", what, ours, more, "times the cost", **goal)]
    for name, way in ways.items():
        k = int(name.split()[0])
        pair = {
            # The paper's way repeats the same work k times 10 times.
            PAPERS: Way(papers.call, papers.amount / 50_000 / k / EPOCHS,
                        note=f"scaled up from {papers.amount} images"),
            ours: Way(way.call, way.amount / 50_000, note=f"from {way.amount:,} images",
                      target=200.0 if (arch, k) == ("cnn", 4) else math.nan),
        }  # fmt: skip
        what = f"50,000 images, {name}, {EPOCHS} epochs, {arch}"
        took = {PAPERS: seconds[PAPERS], ours: seconds[name]}
        rows += to_rows("crafting", what, pair, took, "s", against=PAPERS)
    return rows


# --- evaluation


def evaluation_part(
    images: ImageData, targets: list[Checkpoint], rounds: int, n: int = 500
) -> list[Row]:
    """Measure a table of accuracies: models x test eps x images, transfer from the first model.

    Raises:
        RuntimeError: if the paper's way counts otherwise.
    """
    few, many = images.test.first(48), images.test.first(n)
    source = targets[0]

    def shown(eps: float) -> Dataset:
        pictures = paper_way.Pictures(few)
        return paper_way.Attacked(pictures, deepcopy(source.model), eps) if eps else pictures

    def papers_way() -> list[int]:
        cells = product(targets, paper.TEST_EPS)
        return [paper_way.count_correct(target.model, shown(eps)) for target, eps in cells]

    def ours(test: Split) -> list[int]:
        data = replace(images, test=test)
        attack = "fgsm-per-image"
        table = accuracy_table(targets, data, paper.TEST_EPS, attack=attack, source=source)
        return table["correct"].tolist()

    theirs, mine = papers_way(), ours(few)
    if max(abs(a - b) for a, b in zip(theirs, mine, strict=True)) > 1:
        raise RuntimeError(f"the paper's way counts {theirs} correct, advlab {mine}; not timed")
    size = len(targets) * len(paper.TEST_EPS)
    limit = highest_rate(source.model, images.shape, "predict", 128)
    note = f"{n} images; crafting included"
    ways = {
        PAPERS: Way(papers_way, len(few) * size, note=f"{len(few)} images"),
        "advlab": Way(partial(ours, many), n * size, limit, note=note),
    }
    return compare("evaluation", TABLE, ways, rounds, "image-cells/s", against=PAPERS)


def attacks_part(images: ImageData, model: nn.Module, rounds: int, n: int = 100) -> list[Row]:
    """Measure every attack of the catalogue on the first `n` test images, at eps = 8/255."""
    batch = images.test.first(n).batch(slice(None))
    ways = {
        name: Way(partial(attack, model, *batch, EPS), n, note=attack.about)
        for name, attack in ATTACKS.items()
    }
    return compare("attacks", f"baseline cnn, {n} images", ways, rounds)
