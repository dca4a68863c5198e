"""What is sent to the cluster and lands here: models, their directions, measurements.

baseline -> directions -> augmented models: a model waits for its baseline, and for nothing else.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

from distributed import Future, as_completed
from tqdm import tqdm

from advlab.checkpoints import read_metadata
from advlab.machine import cores, progress_bar
from advlab.recipes import Recipe
from advlab.store import Store, Zoo
from advlab.training import hold_out
from advlab.upkeep import tasks
from advlab.upkeep.cluster import Cluster, start_no_more
from advlab.upkeep.processes import kill_children
from advlab.upkeep.tasks import File, Job


class TaskError(RuntimeError):
    """Tasks that failed, each by its name; what the others made is kept."""


def told(failed: Mapping[str, BaseException]) -> str:
    """Return what failed, by name, and why; what all have in common is said once."""
    names: dict[str, list[str]] = {}
    for name, error in failed.items():
        names.setdefault(f"{type(error).__name__}: {error}", []).append(name)
    return "; ".join(f"{', '.join(those)}: {why}" for why, those in names.items())


def raise_failed(failed: Mapping[str, BaseException], of: int, what: str) -> None:
    """Raise a TaskError that names those that `failed`, if any did.

    Args:
        failed: By name, the error of each.
        of: How many were asked for.
        what: They are called so.
    """
    if failed:
        raise TaskError(
            f"{len(failed)} of {of} {what} failed: {told(failed)}\nWhat is finished is kept: after "
            "mending it, go on with --resume"
        )


def run_bar(label: str, total: int, unit: str) -> tqdm:
    """Return a bar that a terminal redraws each second; a log gets a line of it each minute."""
    bar = progress_bar(label, total, unit)
    bar.mininterval = 1 if sys.stdout.isatty() else 60
    return bar


def images_to_train(zoo: Zoo, job: Job) -> int:
    """Return how many images the training of a model goes through."""
    epochs = zoo.identity(job.arch, job.training)["recipe"]["epochs"]
    if isinstance(job.training, Recipe):
        return epochs * len(hold_out(zoo.data.train)[0])
    return epochs * len(zoo.data.train) * (2 if job.training else 1)


class Trainings:
    """Models that are on their way here.

    Args:
        cluster: Trains them.
        jobs: Those that are missing, the first ones first.
        images: How many images the training of each goes through, by its key.
        bar: Counts images; a line is written for each model that is done.
    """

    def __init__(
        self, cluster: Cluster, jobs: Sequence[Job], images: Mapping[str, int], bar: tqdm
    ) -> None:
        self.cluster, self._bar, self._run = cluster, bar, uuid4().hex[:8]
        self._sent: dict[str, Future] = {}
        self._promises: dict[Job, Promise] = {}
        self._images, self._seen = images, dict.fromkeys(images, 0.0)
        cluster.client.subscribe_topic(tasks.EPOCHS, self._told)
        for job in jobs:
            self._train(job)

    def _submit(self, name: str, function: Any, *arguments: Any) -> Future:
        """Send a task; those that are sent first are done first."""
        key, order = f"{name}-{self._run}", -len(self._sent)
        self._sent[name] = self.cluster.client.submit(
            function, *arguments, key=key, priority=order, pure=False
        )
        return self._sent[name]

    def _train(self, job: Job) -> Future:
        if job in self._promises:
            return self._sent[job.key]
        needs: list[File | Future] = []
        opened = job.options.open()
        if job.training and not isinstance(job.training, Recipe):
            needs = self._baseline_and_directions(Job(job.options, job.arch, 0.0))
        place = self.cluster.place(job.options)
        future = self._submit(job.key, tasks.train_model, place, job, *needs)
        self._promises[job] = Promise()
        future.add_done_callback(partial(self._land, job, opened.zoo.folder))
        return future

    def _baseline_and_directions(self, baseline: Job) -> list[File | Future]:
        """Return the files of both: those that are here, or what will become of the tasks."""
        opened = baseline.options.open()
        place, zoo = self.cluster.place(baseline.options), opened.zoo
        made: File | Future
        name = f"directions, {baseline.key}"
        if path := zoo.find(baseline.arch):
            made = self.cluster.file(path)
            crafted = zoo.directions_path(baseline.arch)
            if crafted.is_file():
                return [made, self.cluster.file(crafted)]
        else:
            made = self._train(baseline)
        if name not in self._sent:
            future = self._submit(name, tasks.craft, place, baseline, made)
            future.add_done_callback(partial(_put, zoo.folder))
        return [made, self._sent[name]]

    def _told(self, event: tuple[float, dict[str, Any]]) -> None:
        _, told = event
        self._move(told["model"], told["images"])

    def _move(self, name: str, images: float) -> None:
        # It goes back where a worker was lost, and its training begins again.
        if name in self._seen:
            self._seen[name] = images
            self._bar.update(round(sum(self._seen.values())) - self._bar.n)

    def _land(self, job: Job, folder: Path, future: Future) -> None:
        """Put a model that is done where it belongs, and tell whoever waits for it."""
        promise = self._promises[job]
        if promise.done():  # the run was stopped
            return
        try:
            path = self.cluster.result(future).put(folder)
            log = read_metadata(path)
        except BaseException as error:
            promise.set_exception(error)
            return
        self._move(job.key, self._images.get(job.key, 0))
        rate = f"{log['images_per_second']:,.0f} images/s"
        self._bar.write(f"  {job.name:<36} accuracy {log['test_accuracy']:.4f}, {rate}")
        done = sum(p.done() for p in self._promises.values()) + 1
        self._bar.set_description(f"{done}/{len(self._promises)} models")
        promise.set_result(path)

    def stop(self) -> None:
        """Call off what is not done, and let nobody wait for it."""
        self.cluster.client.cancel([*self._sent.values()])
        for promise in self._promises.values():
            if not promise.done():
                promise.set_exception(tasks.StoppedError("the run was stopped"))

    def __len__(self) -> int:
        return len(self._promises)

    def __getitem__(self, job: Job) -> Future:
        """Return what will become of a model's file."""
        return self._sent[job.key]

    def __contains__(self, job: Job) -> bool:
        return job in self._promises

    def failed(self, jobs: Iterable[Job]) -> dict[str, BaseException]:
        """Wait until `jobs` are done; return the errors of those that failed, by name."""
        waited = {job.key: self._promises[job] for job in jobs if job in self._promises}
        errors = {name: promise.exception() for name, promise in waited.items()}
        return {name: error for name, error in errors.items() if error}


def _put(folder: Path, future: Future) -> None:
    if future.status == "finished":
        future.result().put(folder)


@contextmanager
def stopping_at_once(trained: Trainings | None, begun: Iterable[Promise]) -> Iterator[Event]:
    """When the block is interrupted, end all that runs, so that no thread waits for it.

    Args:
        trained: What the cluster trains.
        begun: Threads' work that starts processes; read when the block is left.

    Yields:
        Set on interruption: who has not started then must not start.
    """
    stopped = Event()
    try:
        yield stopped
    except BaseException:
        stopped.set()
        if trained:
            trained.stop()
            start_no_more(trained.cluster.client)
        while True:  # a process may just have been starting
            kill_children()
            if not wait(begun, timeout=0.2).not_done:
                break
        raise


def missing(jobs: Iterable[Job]) -> list[Job]:
    """Return those of `jobs` that are not trained yet."""
    return [job for job in jobs if job.options.open().zoo.find(job.arch, job.training) is None]


def processes_for(jobs: Sequence[Job]) -> int:
    """Return how many processes train `jobs` at a time: one a core, but one on a GPU."""
    on_cpu = all(job.options.device == "cpu" for job in jobs)
    return min(cores() if on_cpu else 1, len(jobs))


@contextmanager
def training(cluster: Cluster, jobs: Sequence[Job]) -> Iterator[Trainings]:
    """Send `jobs` to a cluster, and yield what is on its way, under one bar.

    The block goes on at once; it is left when all models are here, or failed.

    Args:
        cluster: Trains them.
        jobs: Models that are `missing`, the first ones first; the baselines that others need are
            added.
    """
    images = {job.key: images_to_train(job.options.open().zoo, job) for job in jobs}
    with run_bar(f"{len(jobs)} models", sum(images.values()), " images") as bar:
        trained = Trainings(cluster, jobs, images, bar)
        try:
            yield trained
            trained.failed(jobs)
        finally:
            trained.stop()


def file(cluster: Cluster, trained: Trainings | None, job: Job) -> File | Future:
    """Return the file of a model as a task can have it, or what will become of it."""
    if trained and job in trained:
        return trained[job]
    return cluster.file(job.options.open().zoo.get(job.arch, job.training).path)


@dataclass(frozen=True)
class Kept(Store):
    """A store that computes nothing: what it has not is a LookupError."""

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result called `name`."""
        found = self.find(name)
        if found is None:
            raise LookupError(f"{name} is not measured yet")
        return found


Measurement = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]


def measure(cluster: Cluster, store: Store, asked: Mapping[str, Measurement], label: str) -> None:
    """Let the cluster measure, and keep what it finds in `store`, where everybody finds it again.

    Args:
        cluster: Measures.
        store: Gets the results, each as soon as it is there.
        asked: By name, functions of `tasks` that return what they measured, by key; and their
            arguments.
        label: Of the bar.

    Raises:
        TaskError: if some failed; what the others found is kept.
    """
    run, failed = uuid4().hex[:8], {}
    sent = {
        cluster.client.submit(function, *given, key=f"{name}-{run}", pure=False): name
        for name, (function, given) in asked.items()
    }
    with run_bar(label, len(sent), "measurement") as bar:
        for future in as_completed(sent):
            try:
                for name, result in cluster.result(future).items():
                    store.keep(name, result)
            except Exception as error:
                failed[sent[future]] = error
            bar.update()
    raise_failed(failed, len(sent), "measurements")
