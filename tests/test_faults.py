"""What goes wrong on a cluster of two machines, and who is kept out of it.

The machines are namespaces (see `nodes`) and the processes real ones. Whoever asks is this process,
in the network of the machine "client".
"""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import write_cifar, write_lesson
from distributed import Client
from nodes import (
    IMPORTED,
    TESTS,
    Authority,
    Cluster,
    Machine,
    alive,
    look_around,
    needs_machines,
    security,
    wait_for,
    why_no_machines,
)
from typer.testing import CliRunner, Result

from advlab import files, store
from advlab._torchvision import datasets
from advlab.checkpoints import read_metadata
from advlab.cli import app
from advlab.recipes import Recipe
from advlab.upkeep import sweep
from advlab.upkeep.cluster import ClusterError, Scheduler, connect
from advlab.upkeep.graph import TaskError, missing, raise_failed, training
from advlab.upkeep.tasks import EPOCHS, Job, Options, token_of

CIFAR10 = datasets.CIFAR10
# Read by Python when it starts: torchvision then expects the MD5 sums of the made-up CIFAR-10.
SITE = """
from advlab._torchvision import datasets
for name, value in {lists}.items():
    setattr(datasets.CIFAR10, name, value)
"""
LONG = Recipe("long", epochs=20, batch_size=32)
ENDLESS = Recipe("endless", epochs=100_000, batch_size=32)
HOPELESS = Recipe("hopeless", epochs=2, batch_size=32, lr=1e30)


@pytest.fixture(autouse=True)
def collected():
    """Let no client that failed be found while another one starts: that would wait for ever."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A scheduler, two workers and a client; what a test stops of them stays so."""
    if why_no_machines():
        pytest.skip(f"no machines of our own: {why_no_machines()}")
    cluster = Cluster(tmp_path_factory.mktemp("machines"))
    for machine in map(cluster.machines.get, (*cluster.WORKERS, "client")):
        with pytest.MonkeyPatch.context() as patched:
            write_cifar(CIFAR10, machine.path("data"), patched)
            lists = {part: getattr(CIFAR10, part) for part in ("train_list", "test_list", "meta")}
        machine.path("python/sitecustomize.py").write_text(SITE.format(lists=lists))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(machines):
    """The same with a worker at least, and this process on the machine "client"."""
    machines.mend(1)
    with machines.machines["client"].network():
        yield machines


@pytest.fixture
def options(fake_cifar10, tmp_path):
    """A run on the made-up CIFAR-10, which keeps its models below tmp_path."""
    return Options("quick", "cifar10", str(fake_cifar10), str(tmp_path / "out")).resolved()


def train(cluster: Cluster, *jobs: Job) -> int:
    """Train models that are missing, as every command does; return how many that were."""
    todo = missing(jobs)
    asked = Scheduler(cluster.ADDRESS, *cluster.machines["client"].credentials.values())
    with connect(asked) as computing, training(computing, todo) as trained:
        raise_failed(trained.failed(todo), len(todo), "trainings")
    return len(todo)


# --- the machines themselves


def test_machines_see_nothing_of_each_other_but_through_the_network(cluster):
    cluster.mend(2)
    client = cluster.machines["client"]
    with Client(cluster.ADDRESS, security=security(client.credentials)) as asks:
        seen = asks.run(look_around, client.folder.parent)
    expected = [("anna", ["anna"], "10.9.0.2"), ("bert", ["bert"], "10.9.0.3")]
    assert sorted(seen.values()) == expected


@pytest.mark.parametrize("who", ["plain", "another authority", "a forged certificate"])
def test_who_has_no_credentials_gets_nothing(cluster, tmp_path, who):
    address, trusted = cluster.ADDRESS, cluster.authority if who.startswith("a forged") else None
    paths = Authority().write(tmp_path, trusted)
    if who == "plain":
        address, paths = address.replace("tls://", "tcp://"), None
    with pytest.raises(OSError, match=r"closed|not match"):
        Client(address, security=security(paths) if paths else None, timeout=2)


CRASH = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from nodes import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.mend(2)
print("ready", flush=True)
sys.stdin.read()
"""


@needs_machines
def test_nothing_is_left_of_machines_whose_test_was_killed(tmp_path):
    command = [sys.executable, "-c", CRASH, str(tmp_path), str(Path(__file__).parent)]
    process = psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    started = process.children(recursive=True)
    assert len(alive(started)) == 7  # four machines, and what runs on three of them
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(started), "no process is left", 5)


# --- every command that computes does so on these machines, too


def command(cluster: Cluster, *words: str) -> Result:
    """Give a command to advlab, and the address and keys of the cluster."""
    paths = cluster.machines["client"].credentials
    names = {"ca-file": "--tls-ca", "cert": "--tls-cert", "key": "--tls-key"}
    keys = [word for part, name in names.items() for word in (name, paths[part])]
    return CliRunner().invoke(app, [*words, "--scheduler", cluster.ADDRESS, *keys])


@pytest.fixture
def clone(empty_home, monkeypatch):
    """A clone with a lesson that needs two models, and one model that is shipped."""
    write_lesson(empty_home, "01_baseline", "print('done')")
    shipped = "data/checkpoints/cnn-baseline-seed0.safetensors"
    (empty_home / shipped).parent.mkdir(parents=True)
    shutil.copy(TESTS.parent / shipped, empty_home / shipped)
    monkeypatch.setattr(store, "fit", None)  # no model is trained in this process
    return empty_home


SWEEP = "sweep --recipe quick --arch cnn --seeds 0-1 --train-eps 0.1 --attack fgsm"


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("run 01 --profile quick --output-dir out", "out/notebooks/01_baseline.ipynb"),
        (f"{SWEEP} --output-dir out", "out/sweep.csv"),
        ("audit cnn --auto-n 1", "outputs/audit/audit.csv"),
    ],
)
def test_commands_compute_on_two_machines(cluster, options, clone, monkeypatch, words, made):
    cluster.mend()
    monkeypatch.chdir(clone)
    done = command(cluster, *words.split(), "--dataset", "cifar10", "--data-dir", options.data_dir)
    assert done.exit_code == 0, done.output
    assert (clone / made).is_file()


def test_command_ends_with_1_where_a_task_failed(cluster, options, clone, monkeypatch):
    cluster.mend()
    monkeypatch.chdir(clone)
    place = ["--dataset", "cifar10", "--data-dir", options.data_dir, "--output-dir", "out"]
    base = sweep.options("cifar10", options.data_dir, "out", "cpu")
    [(first, *_), _] = sweep.Sweep(("quick",), (0, 1), (0.1,), ("cnn",)).groups(base)
    token = token_of(first.open().zoo.folder)
    for name in cluster.WORKERS:  # a folder in the way of one model
        folder = cluster.machines[name].path(f"cache/cluster/{token}/checkpoints")
        (folder / "cnn-eps0.1-seed1.lock").mkdir(parents=True)
    done = command(cluster, *SWEEP.split(), *place)
    assert done.exit_code == 1
    assert re.search(r"failed: [^$]*cnn-eps0\.1-seed1[^$]*--resume", done.output)
    found = {path.name for path in first.open().zoo.folder.glob("cnn-*-seed?.safetensors")}
    others = ("baseline-seed0", "baseline-seed1", "eps0.1-seed0")
    assert found == {f"cnn-{name}.safetensors" for name in others}


# --- faults while a run goes on


def began_on(cluster: Cluster, recipe: Recipe) -> str:
    """Wait for the first epoch of a CNN's training; return the machine where it is."""
    pattern = f"cache/cluster/*/checkpoints/cnn-{recipe.name}-*.state"
    folders = [cluster.machines[name].folder for name in cluster.WORKERS]
    found = wait_for(lambda: [f.name for f in folders if any(f.glob(pattern))], recipe.name, 60)
    return found[0]


@contextmanager
def meanwhile(function, *arguments):
    """Call a function in another thread, and yield its future."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function, *arguments)
        yield future
        future.result()


@pytest.mark.parametrize("where", ["elsewhere", "there"])
def test_training_whose_worker_is_killed_starts_again_with_the_same_weights(
    cluster, options, tmp_path, where
):
    cluster.mend()
    recipe = replace(LONG, name=f"long-{where}")
    job, zoo = Job(options, "cnn", recipe), options.open().zoo
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(train, cluster, job)
        name = began_on(cluster, recipe)
        time.sleep(0.5)  # a few epochs
        for worker in cluster.WORKERS if where == "there" else (name,):
            cluster.machines[worker].stop()
        if where == "there":
            cluster.start_workers(name)
        assert trained.result() == 1
    undisturbed = replace(zoo, folder=tmp_path / "undisturbed").get("cnn", recipe)
    found = read_metadata(zoo.find("cnn", recipe))
    assert found["weights_hash"] == undisturbed.metadata["weights_hash"]
    keys = security(cluster.machines["client"].credentials)
    with Client(cluster.ADDRESS, security=keys) as asks:
        told = [one for _, one in asks.get_events(EPOCHS) if one["model"] == job.key]
    firsts = [one for one in told if round(one["images"]) == len(zoo.data.train)]
    assert len(firsts) == (2 if where == "elsewhere" else 1)  # the state is on that machine


def test_task_that_fails_is_named_and_the_others_go_on(cluster, options, capfd):
    jobs = [Job(options, "cnn", training) for training in (HOPELESS, 0.0, 0.1)]
    told = r"1 of 3 .*cnn-hopeless-seed0 of profile quick: .*Lower the learning rate"
    with pytest.raises(TaskError, match=told):
        train(cluster, *jobs)
    zoo = options.open().zoo
    assert [bool(zoo.find("cnn", training)) for training in (HOPELESS, 0.0, 0.1)] == [0, 1, 1]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_run_whose_scheduler_is_gone_keeps_what_is_finished_and_goes_on(cluster, options, capfd):
    baseline, augmented = Job(options, "cnn", 0.0), Job(options, "cnn", 0.1)
    zoo = options.open().zoo

    def kill():
        wait_for(lambda: zoo.find("cnn"), "the first model is here")
        began_on(cluster, ENDLESS)
        cluster.machines["scheduler"].stop()
        return time.monotonic()

    with meanwhile(kill) as killed:
        with pytest.raises(
            RuntimeError, match=rf"the scheduler {cluster.ADDRESS} is gone(.|\n)*--resume"
        ):
            train(cluster, baseline, Job(options, "cnn", ENDLESS), augmented)
        ended = time.monotonic()
    assert ended - killed.result() < 5
    assert "Traceback" not in "".join(capfd.readouterr())
    # Nobody waits for that training any more, and its worker neither goes on nor stays.
    workers = [cluster.machines[name] for name in cluster.WORKERS]
    wait_for(lambda: not any(worker.running() for worker in workers), "workers end", 30)
    before = zoo.find("cnn").stat()
    cluster.mend(1)
    assert train(cluster, baseline, augmented) == 1
    assert zoo.find("cnn").stat().st_mtime_ns == before.st_mtime_ns


ASKER = """
import sys
from advlab.recipes import Recipe
from advlab.upkeep.cluster import Scheduler, connect
from advlab.upkeep.graph import training
from advlab.upkeep.tasks import Job, Options
options = Options("quick", "cifar10", output_dir="out").resolved()
job = Job(options, "cnn", Recipe(sys.argv[1], epochs=100_000, batch_size=32))
with connect(Scheduler(*sys.argv[2:])) as cluster, training(cluster, [job]):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nobody_works_on_for_a_client_that_has_ended(cluster, options, number):
    client, recipe = cluster.machines["client"], Recipe(f"until-{number:d}", 1)
    words = (recipe.name, cluster.ADDRESS, *client.credentials.values())
    process = client.start("-c", ASKER, *words, log="asker.log")
    worker = cluster.machines[began_on(cluster, recipe)]
    [state] = worker.folder.glob(f"cache/cluster/*/checkpoints/cnn-{recipe.name}-*.state")
    process.send_signal(number)
    process.wait(30)

    def is_still() -> bool:
        before = state.stat().st_mtime_ns
        time.sleep(1)
        return state.stat().st_mtime_ns == before

    wait_for(is_still, "end of the training", 30)
    assert worker.running()


# --- workers that may not begin


def be_odd(machine: Machine, what: str) -> dict[str, str]:
    """Return variables that give a worker another advlab, another torch, or no CIFAR-10."""
    if what == "CIFAR-10":
        return {"ADVLAB_DATA": str(machine.path("tmp"))}
    folder = machine.path(f"other-{what}")
    if what == "advlab":
        shutil.copytree(Path(files.__file__).parent, folder / "advlab")
        with (folder / "advlab" / "attacks.py").open("a") as code:
            code.write("CHANGED = True\n")
    else:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text("import torch\ntorch.__version__ = '9.9.9'\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{IMPORTED}"}


@pytest.mark.parametrize(
    ("what", "mend"),
    [("advlab", "install the same"), ("torch", "install the same"), ("CIFAR-10", "ADVLAB_DATA")],
)
def test_worker_that_is_different_is_named_before_work_starts(cluster, options, what, mend):
    anna, bert = map(cluster.machines.get, cluster.WORKERS)
    bert.stop()
    if not anna.running():
        cluster.start_workers("anna")
    cluster.start_workers("bert", **be_odd(bert, what))
    with pytest.raises(ClusterError, match=rf"worker \S*10\.9\.0\.3\S* .*{what}.*{mend}"):
        train(cluster, Job(options, "cnn", 0.0))
    bert.stop()
    assert options.open().zoo.find("cnn") is None
