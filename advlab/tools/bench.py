"""The benchmark behind every claim of speed: advlab beside the paper's way and other libraries.

`run` measures everything in one go, each comparison in turn on the same images, and writes a table,
a CSV and a figure. Ratios carry over to other machines, seconds do not.
"""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pandas as pd
import torch
from nbclient import NotebookClient
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from advlab import attacks, data, evaluation, files, models, paper, plots, session
from advlab.attacks import fgsm, fgsm_direction, perturb
from advlab.checkpoints import Checkpoint, load_weights, model_name, read_metadata
from advlab.data import ImageData, Split
from advlab.machine import cores
from advlab.tools import paper_way, rivals
from advlab.tools.measure import (
    PRECISIONS,
    Ceilings,
    Row,
    cells,
    check_equal,
    multiply_adds,
    peak_megabytes,
    rate_rows,
    side_by_side,
    to_table,
)
from advlab.training import AugmentedSet, Recipe, fit
from advlab.upkeep import readme, runs
from advlab.upkeep.processes import KEEP_MEMORY, environment
from advlab.widgets import AttackExplorer

PAPERS = "paper's way"
TABLE = "table of 2 models x 6 eps"
# Operators by what they belong to, as the profiler calls them.
OPERATORS = {
    "convolutions": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("aten::clamp_min", "aten::threshold_backward"),
    "optimiser": ("fused_adam", "Optimizer"),
}
EPOCHS = 10  # of the paper, each of which crafted anew


# --- what the machine can do


def machine_part(ceilings: Ceilings, rounds: int) -> list[Row]:
    """Measure matrix products, convolutions at the models' sizes, and copying."""
    rows = []
    convolutions = nn.Sequential(*models.convolutions())
    work = multiply_adds(convolutions)
    for precision in PRECISIONS:
        a = torch.randn(2048, 2048).to(getattr(torch, precision))
        seconds = side_by_side({f"2,048 x 2,048, {precision}": partial(torch.mm, a, a)}, rounds)
        amounts = dict.fromkeys(seconds, 2048**3 / 1e9)
        rows += rate_rows("ceiling", "matrix product", seconds, amounts, "billion multiply-adds/s")
        for size in (64, 128):
            rate = ceilings.images_per_second(convolutions, "train", size, precision)
            value = 3 * work * rate / 1e9
            note = f"forward and both gradients: {rate:,.0f} images/s at most"
            way = f"batch {size}, {precision}"
            unit = "billion multiply-adds/s"
            rows.append(Row("ceiling", "convolutions", way, value, value, value, unit, note=note))
    source = torch.ones(64_000_000)
    target = torch.empty_like(source)
    seconds = side_by_side({"256 MB": lambda: target.copy_(source)}, rounds)
    rows += rate_rows(
        "ceiling", "copy in memory", seconds, {"256 MB": 2 * 0.256}, "GB/s read and written"
    )
    return rows


# --- training


def _train(arch: str, split: Split, batch: int, precision: str) -> None:
    fit(models.build(arch), split, Recipe("bench", 1, batch, flip=False), precision=precision)


def _train_papers_way(arch: str, split: Split) -> None:
    loader = DataLoader(paper_way.Pictures(split), batch_size=64, shuffle=True)
    paper_way.train_steps(models.build(arch), loader, lr=1e-3)


def _one_process_per_core() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(cores(), get_context("spawn"), torch.set_num_threads, (1,))


def _train_on_every_core(
    pool: ProcessPoolExecutor,
    variables: dict[str, str | None],
    arch: str,
    split: Split,
    precision: str,
) -> None:
    with environment(**variables):  # the first call starts the processes
        for job in [pool.submit(_train, arch, split, 64, precision) for _ in range(cores())]:
            job.result()


def training_part(images: ImageData, ceilings: Ceilings, rounds: int, n: int = 1_920) -> list[Row]:
    """Measure training steps of both architectures: batch sizes, precisions, processes.

    Args:
        images: Data; the first `n` training images are used.
        ceilings: For the fraction of the convolutions' rate.
        rounds: As in `side_by_side`.
        n: Images of one call.
    """
    split, rows = images.train.first(n), []
    best = PRECISIONS[-1]
    for arch in ("cnn", "cnn-lstm"):
        ways: dict[str, Callable[[], Any]] = {PAPERS: partial(_train_papers_way, arch, split)}
        limits = {}
        model = models.build(arch)
        for precision in PRECISIONS:
            for size in (64, 128):
                way = f"batch {size}, {precision}"
                ways[way] = partial(_train, arch, split, size, precision)
                limits[way] = ceilings.images_per_second(model, "train", size, precision)
        amounts = dict.fromkeys(ways, float(n))
        seconds = side_by_side(ways, rounds)
        # On their own: while workers are alive, even asleep, training in this process is slower.
        with _one_process_per_core() as keeping, _one_process_per_core() as returning:
            way = f"batch 64, {best}, one process per core"
            train = partial(_train_on_every_core, arch=arch, split=split, precision=best)
            together = {
                way: partial(train, keeping, KEEP_MEMORY),
                f"{way}, memory given back": partial(train, returning, dict.fromkeys(KEEP_MEMORY)),
            }
            seconds |= side_by_side(together, rounds)
        amounts |= dict.fromkeys(together, float(n * cores()))
        rows += rate_rows(
            "training",
            arch,
            seconds,
            amounts,
            "images/s",
            against=PAPERS,
            ceilings=limits,
            targets={f"batch 64, {best}": 2.2} if arch == "cnn" else {},
            notes={PAPERS: "torchvision data set, DataLoader, float32, batch 64"},
        )
    reached = next(r for r in rows if (r.what, r.way) == ("cnn", f"batch 64, {best}"))
    share = 100 * reached.of_ceiling
    rows.append(
        replace(reached, what="cnn, share of the convolution ceiling", value=share, low=share,
                high=share, unit="%", against="", ratio=None, target=70.0, target_of="at least",
                note="what else the step does: see its operators below")
    )  # fmt: skip
    return rows


def profile_part(images: ImageData, n: int = 1_920) -> list[Row]:
    """Measure on what a training step of the CNN spends its time, operator by operator."""
    split = images.train.first(n)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        _train("cnn", split, 64, PRECISIONS[-1])
    spent = dict.fromkeys([*OPERATORS, "all the rest"], 0.0)
    for event in watched.key_averages():
        kind = next(
            (k for k, names in OPERATORS.items() if any(name in event.key for name in names)),
            "all the rest",
        )
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values())
    task = f"cnn, batch 64, {PRECISIONS[-1]}"
    rows = []
    for kind, time_ in spent.items():
        share = 100 * time_ / whole
        rows.append(Row("a training step's time", task, kind, share, share, share, "%"))
    return rows


# --- crafting


def _craft_papers_way(model: nn.Module, split: Split, eps: float) -> list[Tensor]:
    source = deepcopy(model)  # crafting changes the model that it uses
    attacked = paper_way.Attacked(paper_way.Pictures(split), source, eps)
    return [attacked[i][0] for i in range(len(split))]


def _craft_for(model: nn.Module, split: Split, eps: tuple[float, ...]) -> None:
    """Craft once, then make the attacked images of every training eps and epoch, as `fit` does."""
    direction = fgsm_direction(model, *split.batch(slice(None)), per_image_statistics=True)
    for one in eps:
        for _ in range(EPOCHS):
            for index in torch.arange(len(split)).split(64):
                perturb(split.batch(index)[0], direction.index_select(0, index), one)


def check_crafting(model: nn.Module, split: Split, eps: float) -> None:
    """Raise RuntimeError if batched crafting makes other images than the paper's way."""
    theirs = torch.stack(_craft_papers_way(model, split, eps))
    ours = fgsm(model, *split.batch(slice(None)), eps, per_image_statistics=True)
    check_equal("crafting", theirs, ours)


def crafting_part(
    images: ImageData, source: Checkpoint, ceilings: Ceilings, rounds: int, n: int = 1_000
) -> list[Row]:
    """Measure crafting FGSM images, one direction and for k training eps and ten epochs.

    Args:
        images: Data; the first `n` training images are used, 48 of them for the paper's way.
        source: A baseline.
        ceilings: For the fraction of the convolutions' rate.
        rounds: As in `side_by_side`.
        n: Images of one call.
    """
    model, arch = source.model, source.metadata["arch"]
    few, many = images.train.first(48), images.train.first(n)
    check_crafting(model, few, paper.TABLE_TRAIN_EPS[1])
    whole_batch = many.batch(slice(None))
    limit = ceilings.images_per_second(model, "craft", 64, "float32")

    def whole() -> None:
        with patch.object(attacks, "CHUNK", n):
            fgsm_direction(model, *whole_batch)

    ways = {
        PAPERS: partial(_craft_papers_way, model, few, rivals.EPS),
        "batched, per-image statistics": partial(
            fgsm_direction, model, *whole_batch, per_image_statistics=True
        ),
        "batched, running statistics": partial(fgsm_direction, model, *whole_batch),
        f"running statistics, {n:,} at a time": whole,
    }
    amounts = {name: float(len(few) if name == PAPERS else n) for name in ways}
    rows = rate_rows(
        "crafting",
        f"one direction, {arch}",
        side_by_side(ways, rounds),
        amounts,
        "images/s",
        against=PAPERS,
        ceilings=dict.fromkeys(list(ways)[1:], limit),
        targets={"batched, per-image statistics": 6.0, "batched, running statistics": 9.0}
        if arch == "cnn"
        else {},
        notes={PAPERS: "one image at a time, training mode"},
    )
    return rows + _many_eps(model, arch, few, many, rounds)


def _many_eps(model: nn.Module, arch: str, few: Split, many: Split, rounds: int) -> list[Row]:
    eps = paper.SWEEP_TRAIN_EPS[1:]
    ways: dict[str, Callable[[], Any]] = {
        PAPERS: partial(_craft_papers_way, model, few, rivals.EPS)
    }
    counts = (1, 4, 8)
    for k in counts:
        ways[f"k = {k}"] = partial(_craft_for, model, many, eps[:k])
    seconds = side_by_side(ways, rounds)
    more = seconds[f"k = {counts[-1]}"].median / seconds["k = 1"].median
    rows = [
        Row("crafting", f"{counts[-1]} eps against 1, {EPOCHS} epochs, {arch}", "one direction, "
            "added in the batch", more, more, more, "times the cost", target=1.5,
            target_of="at most")
    ]  # fmt: skip
    for k in counts:
        # Seconds for all 50,000 images; the paper's way repeats the same work k times 10 times.
        amounts = {PAPERS: len(few) / 50_000 / k / EPOCHS, f"k = {k}": len(many) / 50_000}
        name = f"50,000 images, {k} eps, {EPOCHS} epochs, {arch}"
        for row in rate_rows(
            "crafting",
            name,
            {way: seconds[way] for way in amounts},
            amounts,
            "times/s",
            against=PAPERS,
            targets={"k = 4": 200.0} if arch == "cnn" else {},
        ):
            note = "scaled up from 48 images" if row.way == PAPERS else f"from {len(many):,} images"
            rows.append(
                replace(
                    row,
                    way=row.way if row.way == PAPERS else "one direction, added in the batch",
                    value=1 / row.value,
                    low=1 / row.high,
                    high=1 / row.low,
                    unit="s",
                    note=note,
                )
            )
    return rows


# --- evaluation


def evaluation_part(
    images: ImageData, targets: list[Checkpoint], ceilings: Ceilings, rounds: int, n: int = 500
) -> list[Row]:
    """Measure a table of accuracies: models x test eps x images, transfer from the first model."""
    few, many = images.test.first(48), replace(images, test=images.test.first(n))
    source = targets[0]

    def papers_way() -> list[int]:
        counts = []
        for target in targets:
            for eps in paper.TEST_EPS:
                pictures = paper_way.Pictures(few)
                attacked = paper_way.Attacked(pictures, deepcopy(source.model), eps)
                counts.append(paper_way.count_correct(target.model, attacked if eps else pictures))
        return counts

    def ours(data: ImageData) -> list[int]:
        table = evaluation.accuracy_table(
            targets, data, paper.TEST_EPS, attack="fgsm-per-image", source=source
        )
        return table["correct"].tolist()

    theirs, mine = papers_way(), ours(replace(images, test=few))
    if max(abs(a - b) for a, b in zip(theirs, mine, strict=True)) > 1:
        raise RuntimeError(f"the paper's way counts {theirs} correct, advlab {mine}; not timed")
    cells = len(targets) * len(paper.TEST_EPS)
    return rate_rows(
        "evaluation",
        TABLE,
        side_by_side({PAPERS: papers_way, "advlab": partial(ours, many)}, rounds),
        {PAPERS: len(few) * cells, "advlab": n * cells},
        "image-cells/s",
        against=PAPERS,
        ceilings={"advlab": ceilings.images_per_second(source.model, "predict", 128, "float32")},
        notes={PAPERS: f"{len(few)} images", "advlab": f"{n} images; crafting included"},
    )


# --- memory and start-up


def _memory_of_papers_training(dataset: str, root: Path | None) -> None:
    split = data.load(dataset, root).train
    loader = DataLoader(paper_way.Pictures(split), batch_size=64, shuffle=True)
    paper_way.train_steps(models.build("cnn"), islice(loader, 50), lr=1e-3)


def _memory_of_training(dataset: str, root: Path | None) -> None:
    images = data.load(dataset, root).train
    signs = torch.randint(-1, 2, images.images.shape, dtype=torch.int8)
    some = AugmentedSet(images.first(1_600), signs[:1_600], 0.2)
    fit(models.build("cnn"), some, Recipe("bench", 1, flip=False))


def _memory_of_crafting(dataset: str, root: Path | None) -> None:
    images = data.load(dataset, root).train
    fgsm_direction(models.build("cnn"), *images.batch(slice(0, 5_000)), per_image_statistics=True)


def _memory_of_evaluation(dataset: str, root: Path | None) -> None:
    images = data.load(dataset, root)
    path = files.shipped_checkpoints() / "cnn-baseline-seed0.safetensors"
    evaluation.accuracy_table([load_weights(path, "cnn")], images, (0.0, 0.02))


def memory_part(dataset: str, root: Path | None) -> list[Row]:
    """Measure the peak memory of whole processes, each with the whole data set loaded."""
    tasks = {
        ("training", PAPERS): _memory_of_papers_training,
        ("training", "advlab, augmented set"): _memory_of_training,
        ("crafting 5,000 images", "advlab"): _memory_of_crafting,
        ("evaluating a model at two eps", "advlab"): _memory_of_evaluation,
    }
    rows = []
    for (what, way), task in tasks.items():
        peak = peak_megabytes(task, dataset, root)
        rows.append(Row("memory", what, way, peak, peak, peak, "MB of one process"))
    return rows


def _start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def seconds_to_first_figure(lesson: str) -> float:
    """Return the seconds from starting a kernel to the first figure of `lesson`."""
    notebook = nbformat.read(runs.choose_lessons([lesson])[lesson], as_version=4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="advlab-") as folder:
        client = NotebookClient(notebook, config=runs.kernel_config(folder))
        with client.setup_kernel():
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
                if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                    return time.perf_counter() - start
    raise RuntimeError(f"lesson {lesson} shows no figure")


def start_part(rounds: int) -> list[Row]:
    """Measure how long imports take, and a reader's wait for the first figure of lesson 02."""
    ways = {
        "python alone": partial(_start, "pass"),
        "import advlab": partial(_start, "import advlab"),
        "import torch": partial(_start, "import torch"),
        "import advlab.session": partial(_start, "import advlab.session"),
    }
    rows = [
        _seconds_row("start", "a process", name, times.times)
        for name, times in side_by_side(ways, rounds).items()
    ]
    waits = [seconds_to_first_figure("02_fgsm") for _ in range(3)]
    wait = _seconds_row("start", "lesson 02, fresh kernel", "to the first figure", waits)
    return [*rows, replace(wait, target=10.0, target_of="at most")]


def explorer_part(networks: dict[str, nn.Module], images: ImageData) -> list[Row]:
    """Measure what the attack explorer computes for one move of its slider, under FGSM.

    That is the attack, the answers of two networks and three pictures; the browser's part is not.
    """
    explorer = AttackExplorer(networks, images, eps=0)
    times = []
    for eps in range(1, 31):
        start = time.perf_counter()
        explorer.eps.value = eps
        times.append(time.perf_counter() - start)
    row = _seconds_row("explorer", "FGSM, two networks", "one move of the slider", times)
    return [replace(row, target=0.15, target_of="at most")]


def _seconds_row(part: str, what: str, way: str, times: Sequence[float]) -> Row:
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return Row(part, what, way, median, low, high, "s")


# --- the whole paper


def whole_part(rows: list[Row], home: Path) -> list[Row]:
    """Project the paper's way from the rows measured, and set our own runs beside it.

    The paper's ten models: for each architecture a baseline of ten epochs over 50,000 images, four
    robust ones of ten epochs over 100,000 (half of them crafted in that epoch), and a table of five
    models at six eps over 10,000 images, attacked anew for each.

    Args:
        rows: Of training, crafting and evaluation, both architectures.
        home: The repository, with its checkpoints and the record of the last published run of
            `advlab reproduce`.
    """

    def rate(part: str, what: str, way: str = PAPERS) -> float:
        return next(r.value for r in rows if (r.part, r.what, r.way) == (part, what, way))

    seconds = own = 0.0
    for arch in paper.TABLES:
        craft = f"one direction, {arch}"
        seconds += EPOCHS * (50_000 + 4 * 100_000) / rate("training", arch)
        seconds += EPOCHS * 4 * 50_000 / rate("crafting", craft)
        seconds += 5 * 6 * 10_000 / rate("evaluation", TABLE)
        own += 50_000 / rate("crafting", craft, "batched, per-image statistics")
        own += 5 * 6 * 10_000 / rate("evaluation", TABLE, "advlab")
    names = [model_name(arch, eps, 0) for arch in paper.TABLES for eps in paper.TABLE_TRAIN_EPS]
    shipped = [home / "data" / "checkpoints" / f"{name}.safetensors" for name in names]
    processes = json.loads((home / "figures" / "times.json").read_text())["processes"]
    by_paper = own + sum(read_metadata(path)["seconds"] for path in shipped) / processes
    whole = partial(_hours_row, "ten models, two tables")
    note = "training from the models' logs, crafting and tables as measured above"
    found = [
        whole(PAPERS, seconds, note="projected from the steps above and exact counts"),
        whole("advlab, recipe paper", by_paper, seconds / by_paper, 7.0, note),
    ]
    record = home / "figures" / "reproduce.json"
    if record.is_file():
        run_ = json.loads(record.read_text())
        by_fast = own + sum(run_["models"][name] for name in names) / run_["processes"]
        found.append(whole("advlab, recipe fast", by_fast, seconds / by_fast, 18.0, note))
        clock = sum(run_["seconds"].values()) / 3600
        note = f"from nothing, on {run_['machine']}"
        what = f"advlab reproduce: {len(run_['models'])} models, all lessons"
        found.append(
            Row("whole paper", what, "wall clock", clock, clock, clock, "h", target=0.5,
                target_of="at most", note=note)
        )  # fmt: skip
        peak = run_["peak_mb"]
        found.append(
            Row("memory", "advlab reproduce", "all processes", peak, peak, peak, "MB",
                target=2_000, target_of="at most")
        )  # fmt: skip
    return found


def _hours_row(
    what: str,
    way: str,
    seconds: float,
    ratio: float | None = None,
    target: float | None = None,
    note: str = "",
) -> Row:
    hours = seconds / 3600
    against = PAPERS if ratio else ""
    return Row(
        "whole paper", what, way, hours, hours, hours, "h", against, ratio, target=target, note=note
    )


# --- all of it


def measure_apart(dataset: str, root: Path | None, rounds: int) -> list[Row]:
    """Return `measure` of a process that keeps freed memory, as workers and lessons do."""
    with environment(**KEEP_MEMORY), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, dataset, root, rounds).result()


def measure(dataset: str, root: Path | None, rounds: int) -> list[Row]:
    """Measure everything, part by part."""
    console = Console()
    lesson = session.start("lesson", dataset, data_dir=str(root or "auto"), progress=False)
    images, zoo = lesson.data, lesson.zoo
    baselines = {arch: zoo.get(arch) for arch in ("cnn", "cnn-lstm")}
    cnn, robust = baselines["cnn"].model, lesson.settings.robust["robust"]
    ceilings = Ceilings(rounds)
    rows: list[Row] = []
    parts: dict[str, Callable[[], list[Row]]] = {
        "what the machine can do": lambda: machine_part(ceilings, rounds),
        "training": lambda: training_part(images, ceilings, rounds),
        "training, by operator": lambda: profile_part(images),
        **{
            f"crafting, {arch}": partial(crafting_part, images, made, ceilings, rounds)
            for arch, made in baselines.items()
        },
        "evaluation": lambda: evaluation_part(images, [*baselines.values()], ceilings, rounds),
        "FGSM": lambda: rivals.fgsm_part(images, cnn, ceilings, rounds),
        "PGD": lambda: rivals.pgd_part(
            images,
            {
                "standard CNN": (cnn, 4.0),
                **{f"robust {arch}": (zoo.get(arch, robust).model, 1.5) for arch in baselines},
            },
            ceilings,
            rounds,
        ),
        "memory": lambda: memory_part(dataset, root),
        "start": lambda: start_part(rounds),
        "explorer": lambda: explorer_part({a: c.model for a, c in baselines.items()}, images),
        "whole paper": lambda: whole_part(rows, files.home()) if images.name == "CIFAR-10" else [],
    }
    for number, (name, part) in enumerate(parts.items(), 1):
        start = time.perf_counter()
        rows += part()
        console.print(
            f"[{number}/{len(parts)}] {name}: {time.perf_counter() - start:.0f} s", markup=False
        )
    return rows


def show(table: pd.DataFrame, console: Console) -> None:
    """Print the benchmark's table, a block for each part, with its notes below."""
    for part, rows in table.groupby("part", sort=False):
        shown = Table(title=f"\n[bold]{part}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in ("task", "way"):
            shown.add_column(name)
        for name in ("median", "", "ratio", "ceiling", "target"):
            shown.add_column(name, justify="right")
        for row in rows.itertuples():
            shown.add_row(*cells(row))
        console.print(shown)
        for row in rows[rows["note"] != ""].drop_duplicates("note").itertuples():
            console.print(f"{row.way}: {row.note}", style="dim", markup=False)


def run(
    dataset: str = "auto",
    data_dir: str = "auto",
    output_dir: str = "auto",
    rounds: int = 5,
    publish: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure everything; print it, and write bench.csv and bench.png.

    Args:
        dataset, data_dir: As in `session.start`.
        output_dir: Where to write; "auto": outputs/bench in the repository.
        rounds: Measurements of each way.
        publish: Write into the repository's figures/ and refresh the README.
        console: Where to print.

    Raises:
        ValueError: if `rounds` is below 1, or Shapes-10 is to be published.
        RuntimeError: if another way gives other results than ours: then no time is printed.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; measure at least once")
    console = console or Console()
    name, root = session.resolve_data(dataset, data_dir)
    if publish and name != "cifar10":
        raise ValueError("--publish: there is no CIFAR-10, and figures/ holds nothing else")
    chosen = session.setting(output_dir, "", "") or files.home() / "outputs" / "bench"
    if publish:
        chosen = files.home() / "figures"
    output = Path(chosen).expanduser().absolute()
    rows = measure_apart(name, root, rounds)
    table = to_table(rows).assign(machine=runs.machine(), torch=torch.__version__, data=name)
    show(table, console)
    with files.atomic_write(output / "bench.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.5g")
    plots.use_style()
    drawn = io.BytesIO()
    plots.ratios(table).savefig(drawn, format="png", dpi=110)
    files.write_bytes(output / "bench.png", drawn.getvalue())
    if publish:
        readme.refresh(files.home())
    console.print(f"Written: {output / 'bench.csv'} and bench.png", soft_wrap=True, markup=False)
    return table
