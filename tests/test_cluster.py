"""The cluster of this machine: what is trained and measured on it, and who may use which."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from threading import Event
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pandas as pd
import psutil
import pytest
from conftest import draw_pictures
from distributed import Client
from filelock import FileLock
from nodes import Authority, security, wait_for

from advlab import files, lab
from advlab.data import DataError
from advlab.evaluation import accuracy_table
from advlab.recipes import ROBUST, ROBUST_SOFT
from advlab.store import Zoo
from advlab.training import hold_out
from advlab.upkeep import cluster as clusters
from advlab.upkeep import graph, search, sweep, tasks
from advlab.upkeep.cluster import ClusterError, Scheduler
from advlab.upkeep.graph import TaskError
from advlab.upkeep.processes import environment
from advlab.upkeep.sweep import Sweep
from advlab.upkeep.tasks import File, Job, Options, Place, VersionError


@pytest.fixture(autouse=True)
def collected():
    """Let no client that failed be found while another one starts: that would wait for ever."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers, and their cache."""
    with (
        environment(ADVLAB_CACHE=str(tmp_path_factory.mktemp("cache"))),
        clusters.connect(jobs=2) as started,
    ):
        yield started


@pytest.fixture
def options(cluster, tmp_path, monkeypatch):
    """A run on a few pictures, whose cache the workers share."""
    monkeypatch.setenv("ADVLAB_CACHE", cluster.client.submit(cache, pure=False).result())
    for name in ("cat", "dog"):
        draw_pictures(tmp_path / "pictures", name, 12)
    where = f"folder:{tmp_path / 'pictures'}@16"
    return Options("quick", where, output_dir=str(tmp_path / "out")).resolved()


def cache() -> str:
    """Return the cache of the process that is asked."""
    return str(tasks.files.cache_dir())


def train(cluster, jobs):
    with graph.training(cluster, jobs) as trained:
        return trained.failed(jobs)


def test_what_is_missing_is_trained_and_lands_here(cluster, options, capfd):
    jobs = [Job(options, *model) for model in (("cnn", 0.0), ("cnn", 0.2), ("cnn-lstm", 0.1))]
    assert graph.missing(jobs) == jobs
    assert train(cluster, jobs) == {}
    assert graph.missing(jobs) == []
    printed = capfd.readouterr().out
    assert "3/4 models" in printed  # and the baseline of the CNN-LSTM, which nobody asked for
    for job in (*jobs, Job(options, "cnn-lstm", 0.0)):
        found = options.open().zoo.get(job.arch, job.training).metadata
        assert f"  {job.name:<36} accuracy {found['test_accuracy']:.4f}, " in printed
        assert found["threads"] == 1


def test_a_training_that_fails_is_named_and_the_others_are_finished(cluster, options):
    bad, good = Job(options, "cnn", 0.4), Job(options, "cnn", 0.3)
    (options.open().zoo.folder / f"{bad.name}.lock").mkdir(parents=True)
    failed = train(cluster, [bad, good])
    assert list(failed) == ["cnn-eps0.4-seed0 of profile quick"]
    assert graph.missing([bad, good]) == [bad]
    told = r"1 of 2 trainings failed: cnn-eps0.4-seed0 of profile quick: IsADir[^$]*--resume"
    with pytest.raises(TaskError, match=told):
        graph.raise_failed(failed, 2, "trainings")


def test_another_machine_s_worker_keeps_files_of_its_own(options, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_CACHE", str(tmp_path / "mine"))
    zoo = options.open().zoo
    mine = zoo.get("cnn").path
    monkeypatch.setenv("ADVLAB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(tasks, "_tell", lambda *_: None)
    place, job = Place("abc", zoo.data.md5), Job(options, "cnn", 0.1)
    baseline = File(mine, mine.read_bytes())
    signs = tasks.craft(place, Job(options, "cnn", 0.0), baseline)
    made = tasks.train_model(place, job, baseline, signs)
    assert made.path.is_relative_to(tmp_path / "theirs" / "cluster" / "abc")
    assert made.content == made.path.read_bytes()
    assert made.put(tmp_path / "landed").read_bytes() == made.content
    found = tasks.measure(place, options, [made, baseline], (0.0, 0.1), "fgsm", baseline)
    assert len(found) == 4
    with pytest.raises(DataError, match=r"differs here from what is asked for"):
        tasks.open_data(Place("abc", "other"), options)
    tasks.clear(place)
    assert not made.path.exists()


def test_sweep_trains_measures_draws_and_goes_on(cluster, options, tmp_path, monkeypatch, capsys):
    @contextmanager
    def here(scheduler, workers):
        yield cluster

    monkeypatch.setattr(sweep, "connect", here)
    monkeypatch.setattr(Zoo, "_train", None)  # of this process: the workers train
    asked = Sweep(("quick", "robust", "fast"), (0, 1), (0.1,), ("cnn",), ("fgsm",))
    path = sweep.run(asked, options)
    first = path.read_bytes()
    assert "10 models; 0" not in capsys.readouterr().out
    table = pd.read_csv(path)
    keys = ["model", "recipe", "seed", "attack", "source", "source_seed", "test_eps"]
    assert not table.duplicated(keys).any()
    sizes = sweep.paper.TEST_EPS
    assert len(table) == 2 * (2 * 2 * len(sizes) + 5 * 2) + 2 * len(sizes)
    assert table.groupby(["model", "recipe", "seed"])["weights"].nunique().eq(1).all()
    assert table["weights"].nunique() == 10  # of two recipes, too, whose files have one name
    assert set(table.loc[table["attack"] == sweep.TRANSFER, "source"]) == {"cnn baseline"}
    control = table.query("source_seed != seed and recipe == 'quick'")
    assert control["model"].eq("cnn baseline").all()
    assert control["seed"].eq(1).all()
    assert control["source_seed"].eq(0).all()
    zoos = [replace(options, seed=seed).open().zoo for seed in (0, 1)]
    source, target = (zoo.get("cnn") for zoo in zoos)
    data = options.open().data
    measured = accuracy_table([target], data, sizes, attack=sweep.TRANSFER, source=source)
    assert control["correct"].tolist() == measured["correct"].tolist()
    assert path.with_suffix(".png").stat().st_size > 5_000
    monkeypatch.setattr(tasks, "measure", None)  # all is there: nothing is measured again
    assert sweep.run(asked, options).read_bytes() == first
    assert "10 models; 0 models to train" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["auto", "tls://node:8786"])
def test_a_sweep_counts_hours_on_processes_that_it_knows(address, options, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_rate", lambda job: 1.0)
    monkeypatch.setattr(sweep, "processes_for", lambda jobs: 2)
    asked = Sweep(("quick",), (7,), (0.1,), ("cnn",), ("fgsm",))
    sweep.run(asked, options, scheduler=Scheduler(address), dry=True)
    hours = " h on 2 processes)" in capsys.readouterr().out
    assert hours == (address == "auto")


@pytest.mark.parametrize(("recipe", "papers"), [("paper", False), ("fast", True)])
def test_other_data_and_other_recipes_are_not_published(recipe, papers, options, monkeypatch):
    monkeypatch.setattr(sweep.datasets, "are_papers", lambda _: papers)
    with pytest.raises(ValueError, match="--publish writes what the lessons show"):
        sweep.run(Sweep((recipe,)), options, publish=True)


def test_adversarial_trainings_alone_have_a_table_of_their_own(options, monkeypatch, empty_home):
    monkeypatch.setattr(sweep.datasets, "are_papers", lambda _: True)
    monkeypatch.setattr(sweep, "missing", lambda _: [])
    monkeypatch.setattr(sweep, "_is_measured", lambda *_: True)
    monkeypatch.setattr(sweep, "_table", lambda *_: pd.DataFrame({"seed": [0]}))
    monkeypatch.setattr(sweep, "draw", lambda _: None)
    sweep.run(Sweep(("robust", "rs-fgsm"), archs=("cnn",)), options, publish=True)
    made = [path.name for path in (files.home() / "figures").iterdir()]
    assert made == ["seeds_adversarial.csv"]


def test_the_search_changes_one_thing_a_step():
    first, *others = (asdict(search.recipe_of(step, 3)) for step in search.STEPS)
    assert first == asdict(replace(ROBUST, name="search-as-robust", epochs=3, early_stopping=False))
    changed = [{k: v for k, v in other.items() if v != first[k]} for other in others]
    named = {name for one in changed for name in one}
    own = ["name", "crop", "eps", "alpha", "soft", "weight_decay", "adversary", "beta"]
    assert named == set(own)
    both = dict(zip(search.STEPS, [{}, *changed], strict=True))["soft labels and weight decay"]
    together = {k: v for k, v in both.items() if k != "name"}
    assert asdict(ROBUST_SOFT) | together == asdict(ROBUST_SOFT)
    assert len({one["name"] for one in changed}) == len(changed)


def test_the_search_trains_judges_on_held_out_images_and_goes_on(
    cluster, options, tmp_path, monkeypatch, capsys
):
    @contextmanager
    def here(scheduler, workers):
        yield cluster

    short = {"batch_size": 8, "steps": 1}
    steps = {"as robust": short, "soft": short | {"soft": 0.5}}
    monkeypatch.setattr(search, "STEPS", steps)
    monkeypatch.setattr(search, "connect", here)
    asked = {"epochs": 1, "dataset": options.dataset, "output_dir": str(tmp_path / "search")}
    table = search.run(**asked)
    assert list(table["step"]) == ["as robust", "soft"]
    held = hold_out(options.open().data.train)[1]
    assert set(table["n"]) == {len(held)}
    assert table["both"].le(table[["clean", "ce", "margin"]].min(axis=1) + 1e-9).all()
    assert table.loc[0, ["better", "worse", "p"]].tolist() == [0, 0, 1.0]
    first = (tmp_path / "search" / "search.csv").read_bytes()
    monkeypatch.setattr(search, "_make", None)  # all is there
    search.run(**asked)
    assert (tmp_path / "search" / "search.csv").read_bytes() == first
    with pytest.raises(ValueError, match="--publish writes what was measured on CIFAR-10"):
        search.run(**asked, publish=True)


def test_two_sweeps_in_one_folder_are_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(RuntimeError, match="another sweep is writing to"),
    ):
        sweep.run(Sweep(("quick",), archs=("cnn",)), options)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"seeds": "0-2,5"}, Sweep(seeds=(0, 1, 2, 5))),
        ({"seeds": [0, "3-4"], "archs": ["cnn"]}, Sweep(seeds=(0, 3, 4), archs=("cnn",))),
        ({"train_eps": "0.005, 0.2", "recipes": "fast"}, Sweep(("fast",), train_eps=(0.005, 0.2))),
        ({"attacks": []}, Sweep(attacks=())),
    ],
)
def test_sweeps_are_read_from_texts_and_lists(given, found):
    assert sweep.parse(given.items()) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": "a"}, "seeds: 'a' is no whole number from 0 on, and no range like 0-4"),
        ({"seeds": "4-0"}, "the sweep has no seeds"),
        ({"train_eps": "8/255"}, "train_eps: '8/255' is no number"),
        ({"train_eps": [2]}, "train_eps is 2.0; it must be a number from 0 to 1"),
        ({"recipes": "best"}, "unknown recipe 'best'; choose one of paper, fast, quick, fgsm"),
        ({"archs": "vit"}, "unknown architecture 'vit'"),
        ({"attacks": "hammer"}, "unknown attack 'hammer'"),
        ({"colour": "red"}, "unknown part of a sweep 'colour'"),
    ],
)
def test_a_sweep_of_what_there_is_not_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        sweep.parse(given.items())


@pytest.mark.parametrize("text", ["seeds: [0", "- 1", ""])
def test_a_file_that_describes_no_sweep_is_named(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.yaml (is no YAML|must hold lines)"):
        sweep.read_file(tmp_path / "sweep.yaml")


def test_a_file_from_elsewhere_replaces_an_older_one_of_its_name(tmp_path):
    made = File(tmp_path / "there" / "model", b"new")
    (tmp_path / "model").write_bytes(b"old")
    assert made.put(tmp_path).read_bytes() == b"new"


def test_a_worker_that_came_later_runs_no_other_code(options):
    place = Place("abc", options.open().data.md5, ("other code", "torch 9.9"))
    with pytest.raises(VersionError, match=r"another version of advlab .*torch \(torch 9.9, here"):
        tasks.open_data(place, options)


# --- which cluster


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://node:8786", r"speaks no TLS: whoever reaches it can run code as you.*--insecure"),
        ("node:8786", r"scheduler 'node:8786' is no address; it is like tls://HOST:8786"),
        ("tls://", "is no address"),
        ("inproc://a", "is no address"),
    ],
)
def test_a_scheduler_that_may_not_be_used_is_refused(address, message, monkeypatch):
    with pytest.raises(ClusterError, match=message):
        Scheduler(address).resolved()
    monkeypatch.setenv("ADVLAB_SCHEDULER", address)
    with pytest.raises(ClusterError, match=message):
        Scheduler().resolved()


def test_a_plain_scheduler_is_used_where_that_is_said():
    assert Scheduler("tcp://node:8786", insecure=True).resolved() == "tcp://node:8786"
    assert Scheduler().resolved() is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Scheduler("tls://127.0.0.1:1"), "speaks TLS, and there are no keys: give --tls-ca"),
        (Scheduler("tls://127.0.0.1:1", "no.pem"), "there is no file no.pem"),
        (Scheduler("tcp://127.0.0.1:1", insecure=True), "127.0.0.1:1 does not answer"),
    ],
)
def test_a_scheduler_that_cannot_be_reached_is_named(asked, message, monkeypatch):
    monkeypatch.setattr(clusters, "SECONDS", 1)
    with pytest.raises(ClusterError, match=message), clusters.connect(asked):
        pass


class Alone:
    """A client whose scheduler has these many workers each time that it is asked."""

    scheduler = SimpleNamespace(address="tls://node:8786")
    status = "running"

    def __init__(self, *workers: int) -> None:
        self.workers, self.left = list(workers), Event()

    def scheduler_info(self):
        found = self.workers.pop(0)
        if not self.workers:
            self.left.set()
        return {"workers": dict.fromkeys(range(found))}


def test_a_scheduler_without_workers_is_told_of_once(monkeypatch, capsys):
    monkeypatch.setattr(clusters, "SECONDS", 0.01)
    client = Alone(2, 0, 0, 1, 0, 1)
    clusters._say_when_alone(client, client.left)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # it came back once, and was lost again
    assert "tls://node:8786 has no worker left" in lines[0]


@pytest.mark.parametrize("bokeh", [True, False])
def test_the_dashboard_is_named_where_there_is_one(bokeh, monkeypatch, capsys):
    monkeypatch.setattr(clusters, "DASHBOARD", bokeh)
    with clusters.connect(jobs=1) as started:
        link = started.client.dashboard_link
    assert (f"dashboard of the cluster: {link}" in capsys.readouterr().out) == bokeh


@pytest.mark.parametrize("part", [0, 1])
def test_workers_of_another_version_are_refused_by_name(cluster, monkeypatch, part):
    own, name = tasks.about(), ("advlab", "torch")[part]
    other = tuple("9.9" if k == part else value for k, value in enumerate(own))
    monkeypatch.setattr(clusters.tasks, "about", lambda: other)
    monkeypatch.setattr(type(cluster), "ask_all", lambda *_: {"tls://a:1": own})
    with pytest.raises(ClusterError, match=rf"worker tls://a:1 has another version of {name} "):
        clusters._check_versions(cluster)


def listening() -> set[tuple[str, int]]:
    """Return the addresses at which this process and its children listen."""
    me = psutil.Process()
    sockets = [s for p in (me, *me.children(recursive=True)) for s in p.net_connections()]
    return {tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN}


def test_the_own_cluster_listens_on_loopback_and_knows_its_user_alone(cluster, tmp_path):
    stranger, opened = security(Authority().write(tmp_path)), listening()
    assert {host for host, _ in opened} == {"127.0.0.1"}
    asked = {port for _, port in opened if not speaks_http(port)}
    assert len(asked) == 1 + 2 * 2  # the scheduler, two workers and their nannies
    for port in asked:
        for scheme, keys in (("tcp", None), ("tls", stranger)):
            with pytest.raises(OSError, match=r"closed|not match"):
                Client(f"{scheme}://127.0.0.1:{port}", security=keys, timeout=2)
            gc.collect()  # now: one that is found while another starts waits for it, for ever


def speaks_http(port: int) -> bool:
    """Tell whether Dask's pages would be at this port; assert that they are not."""
    answers = set()
    for page in ("info/main/workers.html", "json/counts.json", "metrics", "health"):
        with pytest.raises(OSError, match=r"404|reset|closed") as refused:
            urlopen(f"http://127.0.0.1:{port}/{page}", timeout=2)
        answers.add(isinstance(refused.value, HTTPError))
    assert len(answers) == 1
    return answers.pop()


def test_workers_see_the_settings_of_now(cluster):
    for value in ("one", "two"):
        with environment(ADVLAB_CACHE=value), clusters.connect(jobs=1) as other:
            assert other.client.submit(cache).result() == value
    with environment(ADVLAB_CACHE=None), clusters.connect(jobs=1) as other:
        assert other.client.submit(cache).result() not in ("one", "two")


def test_workers_end_when_there_is_nothing_left_to_do():
    with clusters.connect(jobs=1) as started:
        [worker] = started.ask_all(os.getpid).values()
        started.release()
        wait_for(lambda: not psutil.pid_exists(worker), "the worker has ended", 20)


@pytest.mark.parametrize(
    ("module", "spared"),
    [("tasks", {"matplotlib", "papermill", "seaborn"}), ("runs", {"matplotlib", "seaborn"})],
)
def test_workers_and_who_leads_them_import_no_plotting(module, spared):
    code = f"import sys, advlab.upkeep.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not spared & set(loaded.stdout.split())


def test_options_are_decided_once(empty_home, monkeypatch, fake_cifar10):
    monkeypatch.delenv("ADVLAB_OUTPUT")
    monkeypatch.setenv("ADVLAB_DEVICE", "cpu")
    found = Options(data_dir=str(fake_cifar10)).resolved()
    output = str(lab.default_output("lesson", "cifar10"))
    assert found == Options("lesson", "cifar10", str(fake_cifar10), output, 0, "cpu")
    assert found.resolved() == found
    assert found.variables()["ADVLAB_DATA"] == str(fake_cifar10)
    assert "ADVLAB_DATA" not in Options("quick", "shapes10").resolved().variables()


def test_one_process_a_core_but_one_on_a_gpu(monkeypatch):
    monkeypatch.setattr(graph, "cores", lambda: 4)
    jobs = [Job(Options(device="cpu"), "cnn", eps) for eps in (0.0, 0.1, 0.2)]
    assert graph.processes_for(jobs) == 3
    assert graph.processes_for(jobs * 2) == 4
    assert graph.processes_for([Job(Options(device="cuda"), "cnn", 0.0)] * 3) == 1
