"""Train every model that the lessons need, one process per core."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch

from advlab import session
from advlab.checkpoints import Training, Zoo
from advlab.training import Recipe, hold_out, progress_bar

Model = tuple[str, Training]
_zoo: Zoo


# The C library of Linux gives large blocks back to the system as soon as they are freed, and a
# training step asks for the same ones again: workers keep them (`advlab bench` measures it), but
# not those of 20 MB or more, which are pieces of the data set.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(20 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables (None: unset them) for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def open_zoo(profile: str, dataset: str, seed: int, data_dir: str, output: str) -> Zoo:
    """Open the zoo of a run; a plain function of a light module, for worker processes."""
    return session.start(profile, dataset, seed, data_dir, output, progress=False).zoo


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(make_zoo: Callable[[], Zoo], threads: int, epochs: SimpleQueue) -> None:
    global _zoo
    torch.set_num_threads(threads)
    _zoo = make_zoo()
    _zoo.on_epoch = lambda name, row: epochs.put((name, row["seconds"] * row["images_per_second"]))


def _train(model: Model) -> tuple[str, float, float]:
    checkpoint = _zoo.get(*model)
    log = checkpoint.metadata
    return checkpoint.path.stem, log["test_accuracy"], log["images_per_second"]


def _images_to_train(zoo: Zoo, model: Model) -> int:
    """Return how many images the training of a model goes through."""
    arch, training = model
    epochs = zoo.identity(arch, training)["recipe"]["epochs"]
    if isinstance(training, Recipe):
        return epochs * len(hold_out(zoo.data.train)[0])
    return epochs * len(zoo.data.train) * (2 if training else 1)


def train_models(make_zoo: Callable[[], Zoo], wanted: list[Model], jobs: int | None = None) -> int:
    """Train those of `wanted` that are missing, `jobs` at a time, under one progress bar.

    The models are independent, so one single-threaded process per core does more images per second
    than one process with all cores (`advlab bench` measures both). A robust model waits for its
    baseline.

    Args:
        make_zoo: Makes the zoo in each process; picklable.
        wanted: (architecture, training) of each model, as for `Zoo.get`; baselines first.
        jobs: Processes at a time; one per core by default.

    Returns:
        How many models were trained.
    """
    zoo = make_zoo()
    missing = [m for m in wanted if zoo.find(*m) is None]
    if not missing:
        return 0
    images = {
        zoo.file_name(*m).removesuffix(".safetensors"): _images_to_train(zoo, m) for m in missing
    }
    del zoo  # and its images: the workers have their own
    jobs = min(jobs or cores(), len(missing))
    context = get_context("spawn")
    epochs = context.SimpleQueue()
    setup = (make_zoo, max(1, cores() // jobs), epochs)
    bar = progress_bar(f"{len(missing)} models", sum(images.values()), " images")
    with (
        bar,
        environment(**KEEP_MEMORY),
        ProcessPoolExecutor(jobs, context, _start_worker, setup) as pool,
    ):
        done, pending = dict.fromkeys(images, 0.0), {pool.submit(_train, m) for m in missing}
        finished = 0
        while pending:
            # A terminal redraws the bar; a log would get a line of it each time.
            pause = 1 if sys.stdout.isatty() else 60
            ready, pending = wait(pending, timeout=pause, return_when=FIRST_COMPLETED)
            while not epochs.empty():
                name, seen = epochs.get()
                if name in done:  # not a baseline that nobody asked for but a robust model needs
                    done[name] += seen
            for future in ready:
                name, accuracy, rate = future.result()
                done[name] = images[name]
                finished += 1
                bar.write(f"  {name:<36} accuracy {accuracy:.4f}, {rate:,.0f} images/s")
            bar.set_description(f"{finished}/{len(missing)} models", refresh=False)
            bar.n = round(sum(done.values()))
            bar.refresh()
    return len(missing)
