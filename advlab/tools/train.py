"""Train every model that the lessons need, one process per core."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from advlab.checkpoints import Zoo

Model = tuple[str, float]
_zoo: Zoo


def _start_worker(make_zoo: Callable[[], Zoo], threads: int) -> None:
    global _zoo
    torch.set_num_threads(threads)
    _zoo = make_zoo()
    _zoo.on_epoch = _print_epoch


def _print_epoch(name: str, row: dict[str, float]) -> None:
    if row["seconds"] < 10:  # models of seconds get a line each, below; epochs of a minute as well
        return
    print(
        f"  {name}  epoch {row['epoch']:2d}  loss {row['train_loss']:.3f}  "
        f"test accuracy {row['test_accuracy']:.3f}  {row['images_per_second']:.0f} images/s",
        flush=True,
    )


def _train(model: Model) -> tuple[Model, float]:
    checkpoint = _zoo.get(*model)
    return model, checkpoint.metadata["test_accuracy"]


def train_models(make_zoo: Callable[[], Zoo], wanted: list[Model], jobs: int | None = None) -> None:
    """Train those of `wanted` that are missing; baselines first, `jobs` at a time.

    The models are independent, so one single-threaded process per core does more images per second
    than one process with all cores (about 1.2 times on two). A robust model waits for its baseline.

    Args:
        make_zoo: Makes the zoo in each process; picklable.
        wanted: (architecture, training eps) of each model.
        jobs: Processes at a time; one per core by default.
    """
    zoo = make_zoo()
    missing = [m for m in wanted if zoo.find(*m) is None]
    if not missing:
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    jobs = min(jobs or cores, len(missing))
    start = time.perf_counter()
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), _start_worker, (make_zoo, max(1, cores // jobs))
    ) as pool:
        pending = [pool.submit(_train, model) for model in missing]
        for done, future in enumerate(as_completed(pending), 1):
            (arch, eps), accuracy = future.result()
            minutes = (time.perf_counter() - start) / 60
            left = minutes / done * (len(missing) - done)
            print(
                f"{done}/{len(missing)} models  {arch} eps={eps:g}  accuracy {accuracy:.4f}  "
                f"{minutes:.1f} min, about {left:.0f} min left",
                flush=True,
            )
