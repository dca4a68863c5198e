"""The benchmark: a guard of the work that crafting does, and its arithmetic on made-up timings."""

import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import balance, make_measurement, write_lesson
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advlab import checkpoints, models, paper, widgets
from advlab.attacks import fgsm, fgsm_direction, pgd
from advlab.checkpoints import Checkpoint, weights_hash
from advlab.data import ImageData, Split
from advlab.tools import bench, paper_way, rivals
from advlab.tools.measure import Row, to_table
from advlab.training import AugmentedSet
from advlab.upkeep.processes import KEEP_MEMORY
from advlab.upkeep.runs import machine

PAPERS = bench.PAPERS


class SomeCeilings:
    """A machine whose convolutions allow 1,000 images per second, whatever the model."""

    def images_per_second(self, *_):
        return 1_000.0


@pytest.fixture
def instant(monkeypatch):
    """Let each way be called once and have taken the seconds that are set here, or else one."""
    seconds = {}

    def side_by_side(ways, rounds):
        for way in ways.values():
            way()
        return {name: make_measurement(seconds.get(name, 1.0)) for name in ways}

    for module in (bench, rivals):
        monkeypatch.setattr(module, "side_by_side", side_by_side)
    return seconds


def by_way(rows, what):
    return {row.way: row for row in rows if row.what == what}


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


# --- crafting


@pytest.fixture(scope="module")
def source():
    """An untrained CNN, with as much of a checkpoint as crafting needs."""
    return SimpleNamespace(model=models.build("cnn").eval(), metadata={"arch": "cnn"})


def test_crafting_counts_images_and_scales_to_the_whole_data_set(shapes, source, instant):
    instant.update({PAPERS: 4.0, "k = 4": 1.25, "k = 8": 1.5})
    rows = bench.crafting_part(shapes, source, SomeCeilings(), rounds=1, n=100)
    one = by_way(rows, "one direction, cnn")
    assert one[PAPERS].value == 48 / 4
    assert (one[PAPERS].ratio, one[PAPERS].of_ceiling) == (None, None)
    ways = ["batched, per-image statistics", "batched, running statistics"]
    for way in [*ways, "running statistics, 100 at a time"]:
        assert one[way].value == 100
        assert one[way].ratio == pytest.approx(100 / 12)
        assert one[way].of_ceiling == pytest.approx(0.1)
    for k, seconds in ((1, 1.0), (4, 1.25), (8, 1.5)):
        found = by_way(rows, f"50,000 images, {k} eps, 10 epochs, cnn")
        ours = found["one direction, added in the batch"]
        theirs = found[PAPERS]
        # 48 images in 4 s, crafted anew for each eps and epoch; 100 in a second, once.
        assert theirs.value == pytest.approx(50_000 / 48 * 4 * k * 10)
        assert ours.value == pytest.approx(50_000 / 100 * seconds)
        assert ours.ratio == pytest.approx(theirs.value / ours.value)
        assert (ours.unit, theirs.ratio) == ("s", None)
        assert ours.low <= ours.value <= ours.high
    (cost,) = [row for row in rows if row.unit == "times the cost"]
    assert cost.value == pytest.approx(1.5)


def wrong_attack(model, image, label, eps):
    return (image + eps).clamp(0, 1)


def test_crafting_that_differs_is_not_timed(shapes, source, instant, monkeypatch):
    monkeypatch.setattr(paper_way, "fgsm_one", wrong_attack)
    with pytest.raises(RuntimeError, match=r"crafting differs from advlab in .*not timed"):
        bench.crafting_part(shapes, source, SomeCeilings(), rounds=1, n=100)


# --- training


def test_training_counts_images_of_all_processes(shapes, instant, monkeypatch):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(bench, "cores", lambda: 3)
    monkeypatch.setattr(bench, "PRECISIONS", ("float32",))
    instant[PAPERS] = 2.0
    rows = bench.training_part(shapes, SomeCeilings(), rounds=1, n=64)
    for arch in ("cnn", "cnn-lstm"):
        found = by_way(rows, arch)
        assert {way: row.value for way, row in found.items()} == {
            PAPERS: 32,
            "batch 64, float32": 64,
            "batch 128, float32": 64,
            "batch 64, float32, one process per core": 192,
            "batch 64, float32, one process per core, memory given back": 192,
        }
        assert found["batch 64, float32"].ratio == 2
    (share,) = [row for row in rows if row.unit == "%"]
    assert share.value == pytest.approx(100 * 64 / 1_000)


def test_every_kind_of_operator_is_found_in_a_training_step(shapes):
    rows = bench.profile_part(shapes, n=64)
    shares = {row.way: row.value for row in rows}
    assert list(shares) == [*bench.OPERATORS, "all the rest"]
    assert sum(shares.values()) == pytest.approx(100)
    # A name that the profiler does not know would leave its kind empty.
    assert all(share > 0 for share in shares.values()), shares


# --- evaluation


@pytest.fixture
def checkpoint(small_cnn):
    """A small model as a checkpoint."""
    metadata = {"arch": "cnn", "train_eps": 0.0, "seed": 0, "recipe": {"name": "none"}}
    metadata["weights_hash"] = weights_hash(small_cnn)
    return Checkpoint(small_cnn, metadata, Path("nowhere"))


@pytest.fixture
def easy(shapes, checkpoint):
    """Shapes-10 with the labels that the model gives its test images."""
    labels = balance(checkpoint.model, shapes.test.batch(slice(None))[0])
    return ImageData(shapes.name, shapes.classes, shapes.train, Split(shapes.test.images, labels))


def test_evaluation_counts_images_in_all_cells(easy, checkpoint, instant):
    instant[PAPERS] = 3.0
    rows = bench.evaluation_part(easy, [checkpoint] * 2, SomeCeilings(), rounds=1, n=100)
    found = by_way(rows, bench.TABLE)
    assert found[PAPERS].value == pytest.approx(48 * 2 * 6 / 3)
    assert found["advlab"].value == 100 * 2 * 6
    assert found["advlab"].ratio == pytest.approx(1_200 / 192)
    assert found["advlab"].of_ceiling == pytest.approx(1.2)


def test_evaluation_that_counts_otherwise_is_not_timed(easy, checkpoint, instant, monkeypatch):
    monkeypatch.setattr(paper_way, "fgsm_one", lambda model, image, label, eps: image)
    with pytest.raises(RuntimeError, match=r"the paper's way counts \[48, .*not timed"):
        bench.evaluation_part(easy, [checkpoint], SomeCeilings(), rounds=1, n=100)


# --- beside libraries

RIVALS_EPS = 0.002  # breaks about half of the images of `easy`


def make_library(name, eps=RIVALS_EPS, steps=20):
    """Return a function that sets up a made-up library whose attacks are ours."""

    def make(model, alpha):
        return rivals.Library(
            name,
            lambda images, labels: fgsm(model, images, labels, eps),
            lambda images, labels: pgd(
                model, images, labels, eps, alpha=eps / 4, steps=steps, random_start=False
            ),
        )

    return make


@pytest.fixture
def install(monkeypatch):
    """Install made-up libraries in place of the real ones."""
    monkeypatch.setattr(rivals, "EPS", RIVALS_EPS)

    def install(*makers):
        monkeypatch.setattr(
            rivals, "libraries", lambda model, alpha, steps: [make(model, alpha) for make in makers]
        )

    return install


@pytest.fixture
def thousand(easy):
    """Eight times the same test images, so that there are 1,000."""
    test = Split(easy.test.images.repeat(8, 1, 1, 1)[:1000], easy.test.labels.repeat(8)[:1000])
    return ImageData(easy.name, easy.classes, easy.train, test)


def test_fgsm_is_compared_with_the_fastest_library(thousand, checkpoint, instant, install):
    install(make_library("slow"), make_library("quick"))
    instant.update({"advlab": 1.0, "quick": 2.0, "slow": 4.0})
    rows = rivals.fgsm_part(thousand, checkpoint.model, SomeCeilings(), rounds=1)
    assert [row.what for row in rows[::3]] == [
        "1 image",
        "10 images",
        "100 images",
        "1,000 images",
    ]
    for what in ("1 image", "1,000 images"):
        found = by_way(rows, what)
        assert found["quick"].value == found["advlab"].value / 2
        assert found["slow"].value == found["advlab"].value / 4
        assert (found["advlab"].against, found["advlab"].ratio) == ("quick", 2)
        assert {found[name].ratio for name in ("slow", "quick")} == {None}


def test_fgsm_counts_the_images_that_the_model_sees(thousand, checkpoint, install, monkeypatch):
    install()
    seen, counted = [], []
    checkpoint.model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

    def side_by_side(ways, rounds):
        seen.clear()
        ways["advlab"]()
        counted.append(sum(seen))
        return {"advlab": make_measurement(1.0)}

    monkeypatch.setattr(rivals, "side_by_side", side_by_side)
    rows = rivals.fgsm_part(thousand, checkpoint.model, SomeCeilings(), rounds=1)
    assert [row.value for row in rows] == counted
    assert counted[-1] == 1_000
    # There is no library here to compare with.
    assert {(row.way, row.against, row.ratio) for row in rows} == {("advlab", "", None)}


def test_library_with_other_fgsm_images_is_not_timed(thousand, checkpoint, instant, install):
    install(make_library("good"), make_library("other", eps=2 * RIVALS_EPS))
    with pytest.raises(RuntimeError, match=r"other's FGSM differs from advlab in .*not timed"):
        rivals.fgsm_part(thousand, checkpoint.model, SomeCeilings(), rounds=1)


def test_pgd_is_compared_with_the_fastest_library(easy, checkpoint, instant, install):
    install(make_library("slow"), make_library("weak", steps=1))
    instant.update({"advlab": 1.0, "slow": 8.0, "weak": 2.0})
    networks = {"small": (checkpoint.model, 4.0)}
    rows = rivals.pgd_part(easy, networks, SomeCeilings(), rounds=1)
    found = by_way(rows, "small, 100 images")
    assert (found["advlab"].against, found["advlab"].ratio) == ("weak", 2)
    assert found["advlab"].target == 4
    assert found["advlab"].of_ceiling == pytest.approx(100 / (1_000 / 20))
    left = {way: int(row.note.split(", ")[1].split()[0]) for way, row in found.items()}
    n = len(easy.test)
    assert n / 10 < left["advlab"] == left["slow"] < left["weak"] < n
    assert found["advlab"].note.startswith(f"of {n} images {n} are right on clean images")


def test_library_that_breaks_more_images_is_not_timed(easy, checkpoint, instant, install):
    install(make_library("good"), make_library("stronger", eps=5 * RIVALS_EPS))
    with pytest.raises(RuntimeError, match="stronger's PGD is stronger than advlab's: "):
        rivals.pgd_part(easy, {"small": (checkpoint.model, 4.0)}, SomeCeilings(), rounds=1)


def test_library_that_is_not_installed_is_left_out(small_cnn, monkeypatch):
    def missing(model, alpha, steps):
        raise ImportError

    ours = make_library("ours")
    monkeypatch.setattr(rivals, "_torchattacks", missing)
    monkeypatch.setattr(rivals, "_art", missing)
    monkeypatch.setattr(rivals, "_foolbox", lambda model, alpha, steps: ours(model, alpha))
    assert [library.name for library in rivals.libraries(small_cnn, 0.01, 1)] == ["ours"]


# --- start


def test_first_figure_ends_the_wait(empty_home):
    figure = "from IPython.display import display; display({'image/png': 'aGk='}, raw=True)"
    trace = f"open({str(empty_home / 'trace')!r}, 'a').write"
    write_lesson(empty_home, "01_first", f"{trace}('before')", figure, f"{trace}('after')")
    assert bench.seconds_to_first_figure("01_first") > 0
    assert (empty_home / "trace").read_text() == "before"


def test_lesson_without_a_figure_is_named(empty_home):
    write_lesson(empty_home, "01_first", "print('no figure')")
    with pytest.raises(RuntimeError, match="lesson 01_first shows no figure"):
        bench.seconds_to_first_figure("01_first")


def test_start_has_quartiles_of_seconds(monkeypatch):
    monkeypatch.setattr(
        bench, "side_by_side", lambda ways, rounds: {w: make_measurement(1, 2, 4) for w in ways}
    )
    waits = iter([7.0, 9.0, 5.0])
    monkeypatch.setattr(bench, "seconds_to_first_figure", lambda lesson: next(waits))
    rows = bench.start_part(rounds=3)
    assert {(row.value, row.low, row.high) for row in rows[:-1]} == {(2, 1.5, 3)}
    assert (rows[-1].value, rows[-1].low, rows[-1].high) == (7, 6, 8)
    assert {row.unit for row in rows} == {"s"}


def test_explorer_is_timed_for_thirty_moves_of_its_slider(monkeypatch, tiny_shapes, small_cnn):
    sizes = []

    def attack_one(models, source, image, label, attack, eps, **options):
        sizes.append(round(255 * eps))
        return real(models, source, image, label, attack, eps, **options)

    real = widgets.attack_one
    monkeypatch.setattr(widgets, "attack_one", attack_one)
    (row,) = bench.explorer_part({"one": small_cnn, "two": small_cnn}, tiny_shapes)
    assert sizes == list(range(31))
    assert (row.unit, row.target, row.target_of) == ("s", 0.15, "at most")
    assert 0 < row.low <= row.value <= row.high


# --- the whole paper


def once(part, what, way, value):
    return Row(part, what, way, value, value, value, "images/s")


@pytest.fixture
def measured():
    """Rows as if all parts had been measured."""
    ours = "batched, per-image statistics"
    return [
        once("training", "cnn", PAPERS, 1_000),
        once("training", "cnn", "batch 64, float32", 9_999),
        once("training", "cnn-lstm", PAPERS, 500),
        once("crafting", "one direction, cnn", PAPERS, 100),
        once("crafting", "one direction, cnn", ours, 1_000),
        once("crafting", "one direction, cnn-lstm", PAPERS, 50),
        once("crafting", "one direction, cnn-lstm", ours, 500),
        once("evaluation", bench.TABLE, PAPERS, 200),
        once("evaluation", bench.TABLE, "advlab", 2_000),
    ]


@pytest.fixture
def shipped(empty_home):
    """A home with the ten models of the tables, each trained in 200 seconds on one of two cores."""
    for arch in paper.TABLES:
        for eps in paper.TABLE_TRAIN_EPS:
            name = f"{arch}-{f'eps{eps:g}' if eps else 'baseline'}-seed0.safetensors"
            path = empty_home / "data" / "checkpoints" / name
            checkpoints.save(torch.nn.Linear(1, 1), {"seconds": 200.0}, path)
    (empty_home / "figures").mkdir()
    (empty_home / "figures" / "times.json").write_text('{"processes": 2}')
    return empty_home


def test_whole_paper_is_the_sum_of_its_parts(measured, shipped):
    theirs, ours = bench.whole_part(measured, shipped)
    # Of each architecture: 4,500,000 images trained, 2,000,000 crafted, 300,000 evaluated.
    cnn = 4_500_000 / 1_000 + 2_000_000 / 100 + 300_000 / 200
    hybrid = 4_500_000 / 500 + 2_000_000 / 50 + 300_000 / 200
    assert theirs.way == PAPERS
    assert theirs.value == pytest.approx((cnn + hybrid) / 3600)
    # Ours: ten trainings on two cores, 50,000 crafted once, 300,000 evaluated.
    own = 10 * 200 / 2 + (50_000 / 1_000 + 300_000 / 2_000) + (50_000 / 500 + 300_000 / 2_000)
    assert ours.value == pytest.approx(own / 3600)
    assert ours.ratio == pytest.approx((cnn + hybrid) / own)
    assert {row.unit for row in (theirs, ours)} == {"h"}
    assert (theirs.ratio, ours.against) == (None, PAPERS)


def test_published_run_stands_beside_the_projection(measured, shipped):
    trained = [path.stem for path in (shipped / "data" / "checkpoints").glob("*.safetensors")]
    record = {"seconds": {"training": 1_000.0, "01": 500.0}, "peak_mb": 1_500, "machine": "mine"}
    record |= {"processes": 4, "models": dict.fromkeys([*trained, "one more"], 80.0)}
    (shipped / "figures" / "reproduce.json").write_text(json.dumps(record))
    theirs, ours, fast, clock, memory = bench.whole_part(measured, shipped)
    # The same ten models, in 80 seconds each on one of four cores, not 200 on one of two.
    assert ours.value - fast.value == pytest.approx((10 * 200 / 2 - 10 * 80 / 4) / 3600)
    assert fast.ratio == pytest.approx(theirs.value / fast.value)
    assert (clock.value, clock.target_of) == (pytest.approx(1_500 / 3600), "at most")
    assert "11 models" in clock.what
    assert "mine" in clock.note
    assert (memory.value, memory.unit, memory.target_of) == (1_500, "MB", "at most")


# --- all of it


@pytest.fixture
def some_rows():
    return [
        Row("training", "cnn", "batch 64", 900, 800, 999, "images/s", PAPERS, 2.5, 0.5, 2.2),
        Row("training", "cnn", PAPERS, 360, 350, 370, "images/s", note="plainly"),
        Row("memory", "training", "advlab", 800, 800, 800, "MB", target=2_000, target_of="at most"),
    ]


def test_table_is_printed_part_by_part(some_rows):
    text = io.StringIO()
    bench.show(to_table(some_rows), Console(file=text, width=160))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines.index("training") < lines.index("memory")
    assert "cnn batch 64 900 images/s ± 11 % 2.5 x 50 % 2.2 x" in lines
    assert f"cnn {PAPERS} 360 images/s ± 3 %" in lines
    assert f"{PAPERS}: plainly" in lines
    assert "training advlab 800 MB at most 2,000" in lines


@pytest.fixture
def measuring(monkeypatch, some_rows):
    """Let `measure_apart` return some rows; gives the arguments that it was called with."""
    asked = []

    def measure(dataset, root, rounds):
        asked.append((dataset, root, rounds))
        return some_rows

    monkeypatch.setattr(bench, "measure_apart", measure)
    return asked


def test_benchmark_is_measured_by_a_process_that_keeps_memory(monkeypatch):
    def threads(jobs, context):  # in place of a process, which takes seconds to start
        assert {name: os.environ[name] for name in KEEP_MEMORY} == KEEP_MEMORY
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(bench, "measure", lambda *arguments: arguments)
    assert bench.measure_apart("shapes10", None, 3) == ("shapes10", None, 3)
    assert not set(KEEP_MEMORY) & set(os.environ)


def test_run_writes_table_and_figure(measuring, empty_home, tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=160)
    output = tmp_path / "here"
    table = bench.run("shapes10", output_dir=str(output), rounds=2, console=console)
    assert measuring == [("shapes10", None, 2)]
    assert sorted(path.name for path in output.iterdir()) == ["bench.csv", "bench.png"]
    written = pd.read_csv(output / "bench.csv")
    assert list(written.columns) == list(table.columns)
    for name in ("way", "value", "unit", "target_of"):
        assert written[name].tolist() == table[name].tolist()
    assert written["ratio"].isna().tolist() == [False, True, True]
    assert set(written["data"]) == {"shapes10"}
    assert set(written["machine"]) == {machine()}
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "2.5 x" in text.getvalue()
    assert not (empty_home / "figures").exists()


def test_readme_shows_the_rows_with_a_target(measuring, empty_home):
    folder = str(empty_home / "figures")
    bench.run("shapes10", output_dir=folder, console=Console(file=io.StringIO()))
    lines = re.sub(" +", " ", bench.readme.bench_block(empty_home)).splitlines()
    assert lines[-2:] == [
        f"| training: cnn | batch 64 | 900 images/s | 2.5 x {PAPERS} | 2.2 x |",
        "| memory: training | advlab | 800 MB | | at most 2,000 |",
    ]
    assert machine() in lines[0]
    assert not any("360" in line for line in lines)  # it has no target


def test_run_writes_into_outputs_unless_told_otherwise(measuring, empty_home):
    bench.run("shapes10", console=Console(file=io.StringIO()))
    assert (empty_home / "outputs" / "bench" / "bench.csv").is_file()


@pytest.mark.parametrize("rounds", [0, -2])
def test_run_refuses_no_rounds(measuring, rounds):
    with pytest.raises(ValueError, match=f"rounds is {rounds}; measure at least once"):
        bench.run("shapes10", rounds=rounds)
    assert measuring == []


def test_publish_writes_into_figures_and_refreshes_the_readme(
    measuring, empty_home, fake_cifar10, monkeypatch
):
    refreshed = []
    monkeypatch.setattr(bench.readme, "refresh", refreshed.append)
    console = Console(file=io.StringIO())
    bench.run(data_dir=str(fake_cifar10), publish=True, console=console)
    assert measuring == [("cifar10", fake_cifar10, 5)]
    assert (empty_home / "figures" / "bench.png").is_file()
    assert refreshed == [empty_home]


def test_other_data_than_cifar10_are_not_published(measuring, empty_home):
    with pytest.raises(ValueError, match="--publish: there is no CIFAR-10"):
        bench.run("shapes10", publish=True)
    assert measuring == []
    assert not (empty_home / "figures").exists()
