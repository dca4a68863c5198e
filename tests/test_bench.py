"""The benchmark: what is not timed, the work that crafting does, what is counted and written."""

import io
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import pytest
import torch
from conftest import as_checkpoint, balance, write_lesson
from nodes import alive, wait_for
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advlab import catalogue, models, paper
from advlab.attacks import fgsm, fgsm_direction, pgd
from advlab.bench import (
    busy,
    footprint,
    measure,
    paper_way,
    parts,
    picture,
    precision,
    rivals,
    run,
    strongest,
)
from advlab.bench.measure import PAPERS, Row, once
from advlab.bench.precision import precision_part
from advlab.bench.whole_paper import whole_part
from advlab.data import Split
from advlab.recipes import Recipe
from advlab.training import AugmentedSet
from advlab.upkeep import runs

EPS = 0.002  # breaks about half of the images of `easy`


@pytest.fixture
def instant(monkeypatch):
    """Let each way be called once and have taken the seconds that are set here, or else one.

    The convolutions of this machine allow 1,000 images per second, whatever the model.
    """
    seconds = {}

    def side_by_side(ways, rounds):
        for way in ways.values():
            way.call()
        return {name: [seconds.get(name, 1.0)] for name in ways}

    for module in (busy, measure, parts, rivals):
        monkeypatch.setattr(module, "side_by_side", side_by_side)
    for module in (parts, rivals):
        monkeypatch.setattr(module, "highest_rate", lambda *_: 1_000.0)
    return seconds


def by_way(rows, what):
    return {row.way: row for row in rows if row.what == what}


@pytest.fixture
def checkpoint(small_cnn):
    """A small model as a checkpoint."""
    return as_checkpoint(small_cnn, Path("nowhere"))


@pytest.fixture
def easy(shapes, checkpoint):
    """Shapes-10 with the labels that the model gives its test images."""
    labels = balance(checkpoint.model, shapes.test.batch(slice(None))[0])
    return replace(shapes, test=Split(shapes.test.images, labels))


# --- the guard: ratios of work counted, for a timing depends on what else the machine does
# (`advlab bench` measures seconds)


class Work(TorchDispatchMode):
    """Count the operators called within, and the floating-point operations of convolutions and
    matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = self.flops = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls += 1
        if count := flop_registry.get(operator.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def test_guard_batched_crafting_shares_its_calls_among_the_images(shapes):
    model = models.build("cnn").eval()
    few = shapes.train.first(16)
    attacked = paper_way.Attacked(paper_way.Pictures(few), deepcopy(model), 0.01)
    with Work() as one_by_one:
        for i in range(len(few)):
            attacked[i]
    with Work() as batched:
        fgsm_direction(model, *shapes.train.batch(slice(None)), per_image_statistics=True)
    n = len(shapes.train)
    # 95 times as many calls one by one; batched, two thirds of the arithmetic: no weight gradients.
    assert one_by_one.calls / len(few) >= 50 * batched.calls / n
    assert 0 < batched.flops / n <= one_by_one.flops / len(few)


def test_guard_eight_training_eps_are_crafted_once(shapes):
    model = models.build("cnn").eval()
    attacked = torch.arange(160, 320)

    def flops(eps):
        with Work() as work:
            directions = fgsm_direction(
                model, *shapes.train.batch(slice(None)), per_image_statistics=True
            )
            for one in eps:  # one epoch of each
                augmented = AugmentedSet(shapes.train, directions, one)
                for index in attacked.split(64):
                    augmented.batch(index)
        return work.flops

    eps = paper.SWEEP_TRAIN_EPS[1:]
    assert flops(eps) == flops(eps[:1]) > 0


# --- parts: images are counted


@pytest.fixture(scope="module")
def source():
    """An untrained CNN, with as much of a checkpoint as crafting needs."""
    return SimpleNamespace(model=models.build("cnn").eval(), metadata={"arch": "cnn"})


def test_crafting_counts_images_and_scales_to_the_whole_data_set(shapes, source, instant):
    instant.update({PAPERS: 4.0, "4 eps": 1.25, "8 eps": 1.5})
    rows = parts.crafting_part(shapes, source, rounds=1, n=100)
    one = by_way(rows, "one direction, cnn")
    assert one[PAPERS].value == 48 / 4
    for way in ("batched, per-image statistics", "batched, running statistics"):
        assert (one[way].value, one[way].of_ceiling) == (100, pytest.approx(0.1))
        assert one[way].ratio == pytest.approx(100 / 12)
    for k, seconds in ((1, 1.0), (4, 1.25), (8, 1.5)):
        found = by_way(rows, f"50,000 images, {k} eps, 10 epochs, cnn")
        ours, theirs = found["one direction, added in the batch"], found[PAPERS]
        # 48 images in 4 s, crafted anew for each eps and epoch; 100 in a second, once.
        assert theirs.value == pytest.approx(50_000 / 48 * 4 * k * 10)
        assert ours.value == pytest.approx(50_000 / 100 * seconds)
        assert ours.ratio == pytest.approx(theirs.value / ours.value)
        assert ours.unit == "s"
    (cost,) = [row for row in rows if row.unit == "times the cost"]
    assert cost.value == pytest.approx(1.5)


def test_images_of_all_processes_cells_and_attacks_are_counted(
    shapes, easy, checkpoint, instant, monkeypatch
):
    monkeypatch.setattr(parts, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(parts, "cores", lambda: 3)
    monkeypatch.setattr(parts, "PRECISIONS", ("float32",))
    instant[PAPERS] = 2.0
    rows = parts.training_part(shapes, rounds=1, n=64)
    for arch in ("cnn", "cnn-lstm"):
        assert {way: row.value for way, row in by_way(rows, arch).items()} == {
            PAPERS: 32,
            "plain PyTorch": 64,
            "batch 64, float32": 64,
            "batch 128, float32": 64,
            "batch 64, float32, one process per core": 192,
            "batch 128, float32, one process per core": 192,
            "batch 64, float32, one process per core, memory given back": 192,
        }
    (share,) = [row for row in rows if row.unit == "%"]
    assert share.value == pytest.approx(100 * 64 / 1_000)
    two = [checkpoint, replace(checkpoint, path=Path("another"))]
    cells = by_way(parts.evaluation_part(easy, two, rounds=1, n=100), parts.TABLE)
    assert (cells[PAPERS].value, cells["advlab"].value) == (48 * 2 * 6 / 2, 100 * 2 * 6)
    assert cells["advlab"].ratio == pytest.approx(1_200 / 288)
    rows = parts.attacks_part(easy, checkpoint.model, rounds=1, n=20)
    attacks = {way: row.value for way, row in by_way(rows, "baseline cnn, 20 images").items()}
    assert attacks == dict.fromkeys(catalogue.ATTACKS, 20)


def test_every_kind_of_operator_is_found_in_a_training_step(shapes):
    shares = {row.way: row.value for row in parts.profile_part(shapes, n=64)}
    assert list(shares) == list(parts.OPERATORS)
    assert sum(shares.values()) == pytest.approx(100)
    # A name that the profiler does not know would leave its kind empty.
    assert all(share > 0 for share in shares.values()), shares


# --- beside libraries


@pytest.fixture
def install(monkeypatch):
    """Install made-up libraries, whose attacks are ours, in place of the real ones."""
    monkeypatch.setattr(rivals, "EPS", EPS)

    def make(model, eps=EPS, steps=20):
        options = {"alpha": eps / 4, "steps": steps, "random_start": False}
        return rivals.Library(
            lambda images, labels: fgsm(model, images, labels, eps),
            lambda images, labels: pgd(model, images, labels, eps, **options),
        )

    def install(**changes):
        def libraries(model, alpha, steps):
            return {name: make(model, **change) for name, change in changes.items()}

        monkeypatch.setattr(rivals, "libraries", libraries)

    return install


def test_fgsm_is_compared_with_the_fastest_library_or_nobody(easy, checkpoint, instant, install):
    install()
    rows = rivals.fgsm_part(easy, checkpoint.model, rounds=1)
    assert {(row.way, row.against) for row in rows} == {("advlab", "")}
    install(slow={}, quick={})
    instant.update({"advlab": 1.0, "quick": 2.0, "slow": 4.0})
    rows = rivals.fgsm_part(easy, checkpoint.model, rounds=1)
    assert [row.what for row in rows[::3]] == ["1 image", "10 images", "100 images"]
    for n, what in ((1, "1 image"), (100, "100 images")):
        found = by_way(rows, what)
        assert [found[name].value for name in ("advlab", "quick", "slow")] == [n, n / 2, n / 4]
        assert (found["advlab"].against, found["advlab"].ratio) == ("quick", 2)
        assert {found[name].against for name in ("slow", "quick")} == {""}


def test_pgd_is_compared_with_the_fastest_library(easy, checkpoint, instant, install):
    install(slow={}, weak={"steps": 1})
    instant.update({"advlab": 1.0, "slow": 8.0, "weak": 2.0})
    rows = rivals.pgd_part(easy, {"small": (checkpoint.model, 4.0)}, rounds=1)
    found = by_way(rows, "small, 100 images")
    ours = found["advlab"]
    assert (ours.against, ours.ratio, ours.target) == ("weak", 2, 4)
    assert ours.of_ceiling == pytest.approx(100 / (1_000 / 20))
    left = {way: int(row.note.split(", ")[1].split()[0]) for way, row in found.items()}
    n = len(easy.test)
    assert n / 10 < left["advlab"] == left["slow"] < left["weak"] < n
    assert ours.note.startswith(f"of {n} images {n} are right on clean images")


def test_what_has_other_results_is_not_timed(
    shapes, source, easy, checkpoint, instant, install, monkeypatch
):
    install(good={}, other={"eps": 2 * EPS})
    with pytest.raises(RuntimeError, match=r"other's FGSM differs from advlab in .*not timed"):
        rivals.fgsm_part(easy, checkpoint.model, rounds=1)
    install(good={}, stronger={"eps": 5 * EPS})
    with pytest.raises(RuntimeError, match="stronger's PGD is stronger than advlab's: "):
        rivals.pgd_part(easy, {"small": (checkpoint.model, 4.0)}, rounds=1)
    monkeypatch.setattr(paper_way, "fgsm_one", lambda model, image, label, eps: image)
    with pytest.raises(RuntimeError, match=r"crafting differs from advlab in .*not timed"):
        parts.crafting_part(shapes, source, rounds=1, n=100)
    with pytest.raises(RuntimeError, match=r"the paper's way counts \[48, .*not timed"):
        parts.evaluation_part(easy, [checkpoint], rounds=1, n=100)


def test_library_that_is_not_installed_is_left_out(small_cnn, monkeypatch):
    def missing(model, alpha, steps):
        raise ImportError

    for name in ("_torchattacks", "_art"):
        monkeypatch.setattr(rivals, name, missing)
    monkeypatch.setattr(rivals, "_foolbox", lambda *_: rivals.Library(None, None))
    assert list(rivals.libraries(small_cnn, 0.01, 1)) == ["foolbox"]


@pytest.mark.parametrize("other", [0, 5])
def test_autoattack_is_timed_where_its_package_has_the_same_verdicts(
    easy, small_cnn, monkeypatch, other
):
    class AutoAttack:
        def __init__(self, model, eps, seed):
            self.model = model

        def run_standard_evaluation(self, images, labels, batch_size):
            return images, self.model(images).argmax(1)

    def ours(model, images, labels, eps, each):
        held = model(images).argmax(1) == labels
        return held if other == 0 else held & (torch.arange(len(labels)) >= other)

    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=AutoAttack))
    monkeypatch.setattr(strongest, "auto_attack", ours)
    monkeypatch.setattr(strongest, "connect", lambda: nullcontext(SimpleNamespace(map=map)))
    ask = partial(strongest.strongest_part, easy, small_cnn, {"a": small_cnn}, n=120, few=2)
    if other:
        with pytest.raises(RuntimeError, match=r"robust CNN: .* other verdicts on 5 images; not"):
            ask()
        return
    rows = ask()
    assert [(row.what, row.way, row.target) for row in rows[1::2]] == [
        ("robust CNN, 120 images", "advlab", 1.3),
        ("the paper's 1 models, 2 images", "advlab", 5.0),
    ]
    for theirs, mine in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs.way, mine.against) == ("pyautoattack", "pyautoattack")
        assert mine.ratio == pytest.approx(mine.value / theirs.value)
    assert rows[1].note == "120 of 120 images hold"
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert ask() == []


# --- what bfloat16 costs


def test_the_control_is_trained_in_float32_and_told_apart_by_a_paired_test(zoo, monkeypatch):
    asked = []

    def fit(model, data, recipe, **more):
        asked.append((data.eps, recipe, more["seed"], more["precision"]))
        model.load_state_dict(other.model.state_dict())
        model.eval()

    other = zoo.get("cnn", 0.005)
    monkeypatch.setattr(precision, "fit", fit)
    rows = precision_part(zoo.data, zoo)
    assert asked == [(0.005, Recipe(**other.metadata["recipe"]), zoo.seed, "float32")]
    ways = ["trained in float32", f"trained in {other.metadata['precision']}"]
    assert [row.way for row in rows] == ways * 3
    n = len(zoo.data.test)
    assert rows[0].what == f"cnn eps=0.005, {n:,} images, clean"
    assert rows[4].what == f"cnn eps=0.005, {n:,} images, the paper's FGSM, eps 0.1"
    assert rows[0].value == pytest.approx(100 * other.metadata["test_accuracy"])
    assert rows[0].low < rows[0].value < rows[0].high
    assert rows[2].value > rows[4].value
    # The same weights are right on the same images.
    assert {row.note for row in rows[::2]} == {
        "0 images right in float32 alone, 0 in the other; p = 1"
    }


# --- what a reader waits for


def test_first_figure_ends_the_wait(empty_home):
    figure = "from IPython.display import display; display({'image/png': 'aGk='}, raw=True)"
    trace = f"open({str(empty_home / 'trace')!r}, 'a').write"
    write_lesson(empty_home, "01_first", f"{trace}('before')", figure, f"{trace}('after')")
    assert footprint.seconds_to_first_figure("01_first") > 0
    assert (empty_home / "trace").read_text() == "before"


def test_lesson_without_a_figure_is_named(empty_home):
    write_lesson(empty_home, "01_first", "print('no figure')")
    with pytest.raises(RuntimeError, match="lesson 01_first shows no figure"):
        footprint.seconds_to_first_figure("01_first")


def stands_in_for_advlab(tmp_path, code):
    """Return the command of a script with `code`, which finds its folders in `output`, `cache`."""
    begin = "import os, sys, time; from pathlib import Path; output = Path(sys.argv[1])\n"
    begin += "cache = Path(os.environ['ADVLAB_CACHE'])\n"
    (tmp_path / "run.py").write_text(begin + code)
    return [sys.executable, str(tmp_path / "run.py")]


def test_first_run_begins_with_nothing_and_is_timed_to_its_first_lesson_and_its_end(tmp_path):
    code = """if True:
        assert not cache.exists() and not output.exists()
        (output / "notebooks").mkdir(parents=True)
        begun = output / "notebooks" / "01_first.partial.ipynb"
        begun.touch()  # as papermill does while a lesson runs
        time.sleep(1)
        begun.write_text("finished")
        begun.replace(output / "notebooks" / "01_first.ipynb")
        time.sleep(1)
        (output / "notebooks" / "02_second.ipynb").touch()
    """
    first, both = footprint.first_run_part(stands_in_for_advlab(tmp_path, code))
    assert (first.what, both.what) == ("all 2 lessons on Shapes-10",) * 2
    assert 0.9 <= first.value < both.value - 0.5


def test_a_first_run_that_fails_is_not_timed(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        footprint.first_run_part(stands_in_for_advlab(tmp_path, "sys.exit(1)"))


@pytest.fixture
def rates():
    """Rows of what "whole paper" is projected from."""
    batched = "batched, per-image statistics"
    rates = {("evaluation", parts.TABLE, PAPERS): 200, ("evaluation", parts.TABLE, "advlab"): 2_000}
    for arch, rate in (("cnn", 1_000), ("cnn-lstm", 500)):
        rates["training", arch, PAPERS] = rate
        rates["training", arch, parts.on_every_core(64)] = 3 * rate
        rates["training", arch, parts.on_every_core(128)] = 4 * rate
        rates["crafting", f"one direction, {arch}", PAPERS] = rate / 10
        rates["crafting", f"one direction, {arch}", batched] = rate
    return [once(*key, value, "images/s") for key, value in rates.items()]


def test_whole_paper_is_the_sum_of_its_parts(rates, empty_home):
    theirs, ours, fast = whole_part(rates, empty_home)
    # Of each architecture: 4,500,000 images trained, 2,000,000 crafted, 300,000 evaluated.
    cnn = 4_500_000 / 1_000 + 2_000_000 / 100 + 300_000 / 200
    hybrid = 4_500_000 / 500 + 2_000_000 / 50 + 300_000 / 200
    assert theirs.value == pytest.approx((cnn + hybrid) / 3600)
    # Ours: 50,000 crafted once, 300,000 evaluated.
    rest = (50_000 / 1_000 + 300_000 / 2_000) + (50_000 / 500 + 300_000 / 2_000)
    own = 4_500_000 / 3_000 + 4_500_000 / 1_500 + rest
    assert ours.value == pytest.approx(own / 3600)
    assert ours.ratio == pytest.approx((cnn + hybrid) / own)
    # By the recipe FAST 7 x 50,000 and 4 x 4 x 100,000.
    own = 1_950_000 / 4_000 + 1_950_000 / 2_000 + rest
    assert (fast.way, fast.value) == ("advlab, recipe fast", pytest.approx(own / 3600))


def test_whole_run_of_another_machine_is_not_set_beside_the_rates_of_this_one(rates, empty_home):
    record = {"wall_seconds": 1_500.0, "peak_mb": 1_500, "machine": "another", "models": {"a": 1.0}}
    (empty_home / "figures").mkdir()
    path = empty_home / "figures" / "reproduce.json"
    path.write_text(json.dumps(record))
    assert len(whole_part(rates, empty_home)) == 3
    path.write_text(json.dumps(record | {"machine": runs.machine()}))
    *_, clock, memory = whole_part(rates, empty_home)
    assert (clock.value, memory.value) == (pytest.approx(1_500 / 3600), 1_500)
    assert "1 models" in clock.what


def test_whole_paper_without_a_rate_of_this_machine_is_refused(rates, empty_home):
    rates = [row for row in rates if row.way != parts.on_every_core(128)]
    with pytest.raises(ValueError, match=r"'training cnn batch 128, .* was not measured on this"):
        whole_part(rates, empty_home)


# --- a busy machine


def test_neighbour_is_at_work_while_it_is_measured_and_ends(shapes, small_cnn, instant):
    before = set(psutil.Process().children())
    with busy.neighbour():
        (process,) = set(psutil.Process().children()) - before
        assert process.is_running()
    assert not process.is_running()
    instant.update({busy.QUIET: 2.0, busy.BUSY: 5.0})
    rows = busy.neighbour_part(shapes, small_cnn, rounds=1)
    found = by_way(rows, f"answers, robust CNN, {len(shapes.test):,} images")
    assert found[busy.BUSY].value == len(shapes.test) / 5
    cost = found["the neighbour's cost"]
    assert (cost.value, cost.target, cost.target_of) == (2.5, 1.5, "at most")
    assert set(psutil.Process().children()) <= before


def test_kernels_cpu_seconds_are_counted_in_a_row_and_at_once(monkeypatch):
    ran = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count, _):
            ran.append(count)
            super().__init__(count)

    clock = iter([0.0, 40.0, 40.0, 90.0])
    monkeypatch.setattr(busy, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(busy, "_of_children", lambda: next(clock))
    monkeypatch.setattr(busy, "run_lesson", lambda name: ran.append(name))
    rows = busy.kernels_part({"ADVLAB_PROFILE": "quick"}, count=4)
    lesson = busy.LESSON
    assert ran == [lesson, *[1, lesson] * 4, 4, *[lesson] * 4]
    assert [row.value for row in rows] == [40, 50, 1.25]
    assert (rows[-1].target, rows[-1].target_of) == (1.2, "at most")


# --- all of it


@pytest.fixture
def measuring(monkeypatch):
    """Let `measure_apart` return some rows; gives the arguments that it was called with."""
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        rows = [
            Row("training", "cnn", "batch 64", 900, 800, 999, "images/s", PAPERS, 2.5, 0.5, 2.2),
            Row("training", "cnn", PAPERS, 360, 350, 370, "images/s", note="plainly"),
            once("memory", "training", "advlab", 800, "MB", target=2_000, target_of="at most"),
        ]
        return rows, {}

    monkeypatch.setattr(run, "measure_apart", measure)
    return asked


def test_run_prints_the_parts_and_writes_table_and_figure(measuring, empty_home, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=160)
    output = tmp_path / "here"
    table = run.run("shapes10", output_dir=str(output), rounds=2, console=console)
    assert measuring == [("shapes10", None, 2, (), [])]
    assert sorted(path.name for path in output.iterdir()) == ["bench.csv", "bench.png"]
    written = pd.read_csv(output / "bench.csv")
    columns = "part what way value low high unit against ratio of_ceiling target target_of note"
    assert list(written.columns) == [*columns.split(), "machine", "torch", "data"]
    assert written["value"].tolist() == table["value"].tolist()
    assert written["ratio"].isna().tolist() == [False, True, True]
    assert set(written["data"]) == {"shapes10"}
    assert set(written["machine"]) == {runs.machine()}
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines.index("training") < lines.index("memory")
    assert "cnn batch 64 900 images/s ± 11 % 2.5 x 50 % 2.2 x" in lines
    assert f"{PAPERS}: plainly" in lines
    assert "training advlab 800 MB at most 2,000" in lines
    assert not (empty_home / "figures").exists()


def test_publish_writes_into_figures_and_refreshes_the_readme(
    measuring, empty_home, fake_cifar10, monkeypatch
):
    refreshed = []
    monkeypatch.setattr(run.readme, "refresh", refreshed.append)
    run.run(data_dir=str(fake_cifar10), publish=True, console=Console(file=io.StringIO()))
    assert measuring == [("cifar10", fake_cifar10, 5, (), [])]
    assert (empty_home / "figures" / "bench.png").is_file()
    assert refreshed == [empty_home]


def test_parts_that_are_measured_anew_replace_their_own_lines(measuring, empty_home, tmp_path):
    earlier = [
        once("training", "cnn", "batch 64", 1, "images/s", note="old"),
        once("workers", "an empty task", "256 workers", 0.5, "ms"),
        once("memory", "crafting", "advlab", 700, "MB"),
    ]
    kept = pd.DataFrame(earlier).assign(machine="another", torch="1", data="shapes10")
    kept.loc[kept["part"] == "memory", "machine"] = runs.machine()
    kept.to_csv(tmp_path / "bench.csv", index=False)
    quiet = {"output_dir": str(tmp_path), "console": Console(file=io.StringIO())}
    run.run("shapes10", only=["training", "memory"], **quiet)
    *_, only, known = measuring[0]
    assert only == ["training", "memory"]
    # What is projected from rates is projected from those of this machine alone.
    assert [(row.part, row.value, row.note) for row in known] == [("memory", 700, "")]
    lines = pd.read_csv(tmp_path / "bench.csv").fillna({"machine": ""})
    assert lines["part"].tolist() == ["training"] * 2 + ["workers"] + ["memory"] * 2
    assert lines["value"].tolist() == [900, 360, 0.5, 700, 800]
    assert lines["machine"].tolist() == [runs.machine()] * 2 + ["another"] + [runs.machine()] * 2


STOPPED = """
import time
from advlab.bench import run
run.measure = time.sleep
run.measure_apart(600)
"""


def test_a_benchmark_that_is_stopped_stops_at_once():
    # In a process of its own: one that is stopped kills all that it has started.
    with psutil.Popen([sys.executable, "-c", STOPPED], stderr=subprocess.PIPE) as process:
        started = [process]

        def measures() -> bool:
            return any("spawn_main" in str(child.cmdline()) for child in process.children())

        try:
            wait_for(measures, "the process that measures", 60)
            started += process.children(recursive=True)
            process.send_signal(signal.SIGINT)
            _, printed = process.communicate(timeout=50)
            wait_for(lambda: not alive(started), "no process is left", 30)
        finally:
            for left in alive(started):
                left.kill()
    assert b"KeyboardInterrupt" in printed


@pytest.mark.parametrize("only", [(), ("memory", "workers")])
def test_a_part_that_fails_is_named_and_the_others_are_written(
    only, empty_home, tmp_path, monkeypatch
):
    def breaks(*_):
        raise OSError("no space")

    here = once("memory", "crafting", "advlab", 800, "MB")
    monkeypatch.setattr(run, "measure_apart", run.measure)
    lesson = SimpleNamespace(data=SimpleNamespace(papers=False), zoo=None)
    lesson.settings = SimpleNamespace(adversarial={"robust": None})
    monkeypatch.setattr(run.footprint, "open_lesson", lambda *_: lesson)
    monkeypatch.setattr(run, "scale_part", breaks)
    monkeypatch.setattr(run.footprint, "memory_part", lambda *_: [here])
    for module, names in {
        run.parts: ("machine", "training", "profile", "crafting", "evaluation", "attacks"),
        run.rivals: ("fgsm", "pgd"),
        run.busy: ("busy",),
        run.footprint: ("start", "first_run", "explorer"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, f"{name}_part", lambda *_: [])
    lesson.zoo = SimpleNamespace(get=lambda *_: SimpleNamespace(model=None))
    earlier = once("workers", "an empty task", "256 workers", 0.5, "ms")
    kept = pd.DataFrame([earlier]).assign(machine="another", torch="1", data="shapes10")
    kept.to_csv(tmp_path / "bench.csv", index=False)
    monkeypatch.setattr(run.picture, "ratios", lambda _: plt.figure())
    asked = {"output_dir": str(tmp_path), "only": only, "console": Console(file=io.StringIO())}
    with pytest.raises(RuntimeError, match=r"^workers failed: OSError: no space$"):
        run.run("shapes10", **asked)
    lines = pd.read_csv(tmp_path / "bench.csv")
    assert lines["value"].tolist() == [0.5, 800]
    monkeypatch.setattr(run.footprint, "memory_part", breaks)
    with pytest.raises(RuntimeError, match=r"memory failed: OSError: no space\nworkers failed"):
        run.run("shapes10", **asked)
    assert pd.read_csv(tmp_path / "bench.csv")["value"].tolist() == [0.5, 800]


def test_the_picture_names_every_machine_of_its_lines():
    rows = [Row("training", way, way, 9, 8, 9, "images/s", PAPERS, 2.5, 0.5, 2.2) for way in "ab"]
    table = pd.DataFrame(rows).assign(machine=["here", "there"])
    assert picture.ratios(table).get_supxlabel() == "advlab bench, medians, on here and there"


def test_an_unknown_part_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match=r"no part of the benchmark is called speed; .*training"):
        run.measure("shapes10", None, 1, ["speed"], [])
