"""Train every model that the lessons need, one process per core."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch
from tqdm import tqdm

from advlab import datasets, lab
from advlab.lab import Lab
from advlab.machine import cores, pick_device, progress_bar
from advlab.recipes import Model, Recipe, file_stem
from advlab.store import Zoo
from advlab.training import hold_out
from advlab.upkeep.processes import KEEP_MEMORY, environment

_zoo: Zoo


@dataclass(frozen=True)
class Options:
    """What is asked of a run, for all its lessons and models; each as in `lab.start`.

    It is of a light module, because worker processes open their zoo by it.
    """

    profile: str = "auto"
    dataset: str = "auto"
    data_dir: str = "auto"
    output_dir: str = "auto"
    seed: int = 0
    device: str = "auto"

    def resolved(self) -> "Options":
        """Return the same with all that "auto" stands for decided, and the folders absolute.

        Raises:
            ValueError: if there is no such profile, data set or device, or the output folder is
                one of the repository's own.
            DataError: if the data cannot be had.
        """
        profile = lab.profile_name(self.profile)  # a wrong one is told before anything is done
        dataset, root = datasets.resolve(self.dataset, self.data_dir)
        output = lab.output_folder(self.output_dir, profile, dataset)
        device = pick_device(self.device)
        folder = str(root.absolute()) if root else "auto"
        return Options(profile, dataset, folder, str(output), self.seed, str(device))

    def variables(self) -> dict[str, str]:
        """Return the environment variables that tell other processes of resolved options."""
        found = {
            "ADVLAB_PROFILE": self.profile,
            "ADVLAB_DATASET": self.dataset,
            "ADVLAB_OUTPUT": self.output_dir,
            "ADVLAB_DEVICE": self.device,
        }
        return found | ({} if self.data_dir == "auto" else {"ADVLAB_DATA": self.data_dir})

    def open(self) -> Lab:
        """Open data, models and kept results of these options."""
        return lab.start(**vars(self), progress=False)

    def open_zoo(self) -> Zoo:
        """Open the models alone; a worker process keeps nothing else."""
        return self.open().zoo


def _start_worker(make_zoo: Callable[[], Zoo], threads: int, epochs: SimpleQueue) -> None:
    global _zoo
    torch.set_num_threads(threads)
    _zoo = make_zoo()
    _zoo.on_epoch = lambda name, row: epochs.put((name, row["seconds"] * row["images_per_second"]))


def _train(model: Model) -> tuple[str, float, float]:
    checkpoint = _zoo.get(*model)
    log = checkpoint.metadata
    return checkpoint.path.stem, log["test_accuracy"], log["images_per_second"]


def _device(zoo: Zoo) -> torch.device:
    return zoo.data.train.images.device


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
    than one process with all cores (`advlab bench` measures both). A GPU gets one process. An
    augmented model waits for its baseline.

    Args:
        make_zoo: Makes the zoo in each process; picklable.
        wanted: (architecture, training) of each model, as for `Zoo.get`; baselines first.
        jobs: Processes at a time; by default one per core, or one on a GPU.

    Returns:
        How many models were trained.
    """
    zoo = make_zoo()
    missing = [m for m in wanted if zoo.find(*m) is None]
    if not missing:
        return 0
    images = {file_stem(*m, zoo.seed): _images_to_train(zoo, m) for m in missing}
    on_cpu = _device(zoo).type == "cpu"
    del zoo  # and its images: the workers have their own
    jobs = min(jobs or (cores() if on_cpu else 1), len(missing))
    context = get_context("spawn")
    epochs = context.SimpleQueue()
    setup = (make_zoo, max(1, cores() // jobs), epochs)
    with (
        progress_bar(f"{len(missing)} models", sum(images.values()), " images") as bar,
        environment(**KEEP_MEMORY),
        ProcessPoolExecutor(jobs, context, _start_worker, setup) as pool,
    ):
        _follow({pool.submit(_train, m) for m in missing}, epochs, images, bar)
    return len(missing)


def _follow(
    pending: set[Future], epochs: SimpleQueue, images: Mapping[str, int], bar: tqdm
) -> None:
    """Move `bar` with the workers' epochs, and write a line for each model that is done.

    Args:
        pending: The trainings, each with the result of `_train`.
        epochs: Gets (model, images seen) after each epoch.
        images: How many images each model's training goes through.
        bar: Counts images.
    """
    seen, finished = dict.fromkeys(images, 0.0), 0
    while pending:
        # A terminal redraws the bar; a log would get a line of it each time.
        pause = 1 if sys.stdout.isatty() else 60
        ready, pending = wait(pending, timeout=pause, return_when=FIRST_COMPLETED)
        while not epochs.empty():
            name, more = epochs.get()
            if name in seen:  # not a baseline that nobody asked for but an augmented model needs
                seen[name] += more
        for future in ready:
            name, accuracy, rate = future.result()
            seen[name] = images[name]
            finished += 1
            bar.write(f"  {name:<36} accuracy {accuracy:.4f}, {rate:,.0f} images/s")
        bar.set_description(f"{finished}/{len(images)} models", refresh=False)
        bar.n = round(sum(seen.values()))
        bar.refresh()
