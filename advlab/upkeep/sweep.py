"""A sweep: recipes x seeds x training eps x architectures, trained and measured into one table.

It goes on where an earlier one into the same folder was stopped: what is trained or measured is
not made again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from advlab import datasets, evaluation, files, lab, paper
from advlab.attacks import check_eps
from advlab.catalogue import ARCHITECTURES, attack_named
from advlab.checkpoints import read_metadata
from advlab.data import check_integer, check_name
from advlab.machine import cores
from advlab.recipes import PROFILES, Recipe, Training, model_name
from advlab.store import Store
from advlab.upkeep import tasks
from advlab.upkeep.cluster import Scheduler, connect
from advlab.upkeep.graph import (
    Kept,
    Measurement,
    TaskError,
    file,
    images_to_train,
    measure,
    missing,
    processes_for,
    raise_failed,
    training,
)
from advlab.upkeep.tasks import Job, Options

EPS = 8 / 255
TRANSFER = "fgsm-per-image"  # the paper's test, from the baseline
# Recipes whose models are augmented, each with the profile that says on how many images.
AUGMENTED = {PROFILES[name].recipe.name: name for name in ("paper", "fast", "quick")}
ADVERSARIAL = list(PROFILES["paper"].adversarial)


@dataclass(frozen=True)
class Sweep:
    """What is to be trained and measured.

    Args:
        recipes: Of `AUGMENTED` or `ADVERSARIAL`; the latter are trained once a seed and
            architecture, with an eps of their own.
        seeds: Of initialisation, order and flips.
        train_eps: Of the augmented models; 0 is the baseline, which is trained in any case.
        archs: Architectures.
        attacks: White box at eps = 8/255. The augmented models are measured under the paper's
            test, too: FGSM from the baseline of the same recipe, architecture and seed. So is, as
            a control, each baseline of another seed than the first: FGSM from the first's.

    Raises:
        ValueError: for a recipe, seed, eps, architecture or attack that there is not.
    """

    recipes: tuple[str, ...] = ("paper",)
    seeds: tuple[int, ...] = (0,)
    train_eps: tuple[float, ...] = paper.TABLE_TRAIN_EPS
    archs: tuple[str, ...] = tuple(paper.TABLES)
    attacks: tuple[str, ...] = ("fgsm", "pgd-20")

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) and field.name != "attacks":
                raise ValueError(f"the sweep has no {field.name}; give one at least")
        for recipe in self.recipes:
            check_name("recipe", recipe, [*AUGMENTED, *ADVERSARIAL])
        for seed in self.seeds:
            check_integer("seed", seed)
        for eps in self.train_eps:
            check_eps(eps, "train_eps")
        for arch in self.archs:
            check_name("architecture", arch, ARCHITECTURES)
        for attack in self.attacks:
            attack_named(attack)

    def groups(self, base: Options) -> Iterator[tuple[Options, str, list[Training]]]:
        """Yield the models by run and architecture, those first that others need.

        Args:
            base: Data and device. Models of its profile are kept in its output folder, those of
                another in a folder below that.
        """
        first = next((r for r in self.recipes if r in AUGMENTED), "paper")
        for seed in self.seeds:
            for recipe in self.recipes:
                profile = AUGMENTED[recipe if recipe in AUGMENTED else first]
                below = "" if profile == base.profile else profile
                output = str(Path(base.output_dir) / below)
                options = replace(base, profile=profile, output_dir=output, seed=seed)
                trainings: list[Training] = [*sorted({0.0, *self.train_eps})]
                if recipe in ADVERSARIAL:
                    trainings = [PROFILES[profile].adversarial[recipe]]
                # The slow one first, so that the cores end together.
                for arch in sorted(self.archs, reverse=True):
                    yield options, arch, trainings


def options(dataset: str, data_dir: str, output_dir: str, device: str) -> Options:
    """Return where a sweep works; "auto" as in `lab.start`, for the folder outputs/sweep-DATASET.

    Raises:
        ValueError, DataError: as `tasks.Options.resolved`.
    """
    name, _ = datasets.resolve(dataset, data_dir)
    chosen = files.setting(output_dir) or str(lab.default_output("sweep", name))
    return Options("lesson", name, data_dir, chosen, 0, device).resolved()


def parse(given: Iterable[tuple[str, Any]]) -> Sweep:
    """Return the sweep that a YAML file or options ask for.

    Args:
        given: Names of `Sweep`'s arguments with a value, a list, or a text of values with commas
            between; whole numbers also as "0-4".

    Raises:
        ValueError: for another name, a value of another kind, or as `Sweep`.
    """
    asked: dict[str, Any] = {}
    for name, value in given:
        check_name("part of a sweep", name, [field.name for field in fields(Sweep)])
        values = value if isinstance(value, list) else str(value).split(",")
        read = {"seeds": _seeds, "train_eps": _numbers}.get(name, _names)
        asked[name] = tuple(one for text in values for one in read(name, str(text).strip()))
    return Sweep(**asked)


def _seeds(name: str, text: str) -> Iterable[int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise ValueError(f"{name}: {text!r} is no whole number from 0 on, and no range like 0-4")
    return range(int(first), int(last or first) + 1)


def _numbers(name: str, text: str) -> Iterable[float]:
    try:
        return [float(text)]
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number; eps is like 0.005") from None


def _names(name: str, text: str) -> Iterable[str]:
    return [text]


def read_file(path: Path) -> dict[str, Any]:
    """Return what a YAML file says of a sweep.

    Raises:
        ValueError: if it is no YAML, or no mapping.
        OSError: if it cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold lines like 'seeds: [0, 1, 2]'")
    return found


# --- what it costs


def cost(jobs: Sequence[Job], workers: int | None) -> str:
    """Return how much there is to train, and about how long it takes.

    Args:
        jobs: Models that are missing.
        workers: Processes that train at a time; None if that is not known, as elsewhere.
    """
    seconds, unknown = 0.0, 0
    for job in jobs:
        rate = _rate(job)
        unknown += rate is None
        seconds += images_to_train(job.options.open().zoo, job) / (rate or 1)
    told = f"{len(jobs)} models to train"
    if jobs and not unknown:
        hours = seconds / 3600
        here = f" ({hours / workers:.1f} h on {workers} processes)" if workers else ""
        told += f", about {hours:.1f} process hours{here}, at the rates of models that were trained"
        told += " before"
    elif jobs:
        told += "; how long it takes is not known, as no such model was trained before"
    return told


def _rate(job: Job) -> float | None:
    """Return the images per second of models like this one: made here, or else shipped."""
    own = job.options.open().zoo.folder
    for folder in (own, files.shipped_checkpoints()):
        logs = [read_metadata(path) for path in folder.glob(f"{job.arch}-*.safetensors")
                if "-directions-" not in path.name]  # fmt: skip
        rates = [log["images_per_second"] for log in logs if _is_alike(log, job)]
        if rates:
            return median(rates)
    return None


def _is_alike(log: dict[str, Any], job: Job) -> bool:
    name = log["recipe"]["name"]
    same = {"arch": job.arch, "shape": list(job.options.open().data.shape)}
    if {**same, **log} | same != {**same, **log}:
        return False
    if isinstance(job.training, Recipe):
        return name == job.training.name
    return name in AUGMENTED


# --- running


def run(
    sweep: Sweep,
    base: Options,
    *,
    scheduler: Scheduler | None = None,
    dry: bool = False,
    publish: bool = False,
    console: Console | None = None,
) -> Path:
    """Train and measure what is missing; write sweep.csv and sweep.png.

    Args:
        sweep: What.
        base: Data, device and output folder, resolved; see `Sweep.groups`.
        scheduler: Which cluster; see `cluster.connect`.
        dry: Only say what it would cost.
        publish: Write the table into the repository's figures too, where lessons and README find
            it: seeds.csv, or of adversarial trainings alone seeds_adversarial.csv.

    Returns:
        The CSV. It has the columns of `evaluation.accuracy_table`, `source_seed`, the seed of the
        model whose gradient made the images, and `weights`, a hash of what was measured.

    Raises:
        TaskError: if trainings or measurements failed; what the others made is kept.
        ClusterError: as `cluster.connect`.
        RuntimeError: if another sweep is at work in the same folder.
        FileNotFoundError: if it was to be published outside a clone.
        ValueError: if other data than CIFAR-10, or a table without the paper's recipe that is not
            of adversarial trainings alone, were to be published.
    """
    console = console or Console()
    if publish:
        files.clone()
    adversarial = all(recipe in ADVERSARIAL for recipe in sweep.recipes)
    known = adversarial or sweep.recipes[0] == "paper"
    if publish and not (datasets.are_papers(base.dataset) and known):
        raise ValueError(
            "--publish writes what the lessons show: CIFAR-10, and recipe paper first or "
            "adversarial ones alone"
        )
    groups = list(sweep.groups(base))
    jobs = [Job(options, arch, one) for options, arch, trainings in groups for one in trainings]
    for job in jobs:
        _take_shipped(job)
    todo = missing(jobs)
    elsewhere = (scheduler or Scheduler()).resolved()
    told = cost(todo, None if elsewhere else processes_for(todo or jobs))
    console.print(f"{len(jobs)} models; {told}.", markup=False, soft_wrap=True)
    output = Path(base.output_dir) / "sweep.csv"
    files.make_folder(output.parent)
    if dry:
        return output
    try:
        with FileLock(output.with_name(".lock"), timeout=0):
            unmeasured = [group for group in groups if not _is_measured(sweep, *group)]
            if unmeasured:
                _make(sweep, unmeasured, todo, scheduler)
    except Timeout as error:
        raise RuntimeError(
            f"another sweep is writing to {output.parent}; wait for it, or choose another "
            "--output-dir"
        ) from error
    table = pd.concat([_table(sweep, *group) for group in groups], ignore_index=True)
    files.write_table(output, table)
    draw(output)
    if publish:
        name = "seeds_adversarial.csv" if adversarial else "seeds.csv"
        files.write_table(files.home() / "figures" / name, table)
    console.print(f"Written: {output} and sweep.png", markup=False, soft_wrap=True)
    return output


Group = tuple[Options, str, list[Training]]


def _make(
    sweep: Sweep, groups: Sequence[Group], todo: Sequence[Job], scheduler: Scheduler | None
) -> None:
    """Train `todo` and measure `groups` on the cluster."""
    with ExitStack() as stack:
        workers = processes_for(todo) if todo else cores()
        cluster = stack.enter_context(connect(scheduler, workers))
        trained = stack.enter_context(training(cluster, todo)) if todo else None
        asked: dict[str, Measurement] = {}
        for options, arch, trainings in groups:
            here = partial(file, cluster, trained)
            models = {one: here(Job(options, arch, one)) for one in trainings}
            place = cluster.place(options)
            asked |= _measurements(sweep, place, options, arch, models)
            if first := _other_seed(sweep, options, trainings):
                baseline = here(Job(first, arch, 0.0))
                control = place, options, [models[0.0]], paper.TEST_EPS, TRANSFER, baseline
                name = f"{arch}, undefended, profile {options.profile}, seed {options.seed}"
                asked[name] = tasks.measure, control
        try:
            measure(cluster, groups[0][0].open().store, asked, "measurements")
        except TaskError:  # what is to be measured may have failed before
            raise_failed(trained.failed(todo) if trained else {}, len(todo), "trainings")
            raise


def _is_measured(sweep: Sweep, options: Options, arch: str, trainings: list[Training]) -> bool:
    if missing(Job(options, arch, one) for one in trainings):
        return False
    try:
        _table(sweep, options, arch, trainings, Kept(options.open().store.folder))
    except LookupError:
        return False
    return True


def _take_shipped(job: Job) -> None:
    """Copy a shipped model that is the one asked for to where the sweep keeps its own."""
    zoo, shipped = job.options.open().zoo, files.shipped_checkpoints()
    path = shipped / zoo.file_name(job.arch, job.training)
    own = zoo.folder / path.name
    if path.is_file() and not own.is_file() and not zoo.mismatch(path, job.arch, job.training):
        files.write_bytes(own, path.read_bytes())


def _other_seed(sweep: Sweep, options: Options, trainings: Sequence[Training]) -> Options | None:
    """Return the run of the first seed, if a baseline of this one is to be shown its images.

    It is the control of the paper's test: an undefended network that is only another one.
    """
    first = replace(options, seed=sweep.seeds[0])
    return first if 0.0 in trainings and first != options else None


def _measurements(
    sweep: Sweep, place: tasks.Place, options: Options, arch: str, models: Mapping[Training, Any]
) -> dict[str, Measurement]:
    """Return what is to be measured of one architecture's models in one run, by name.

    `models` are their files, or what will become of them.
    """
    group = f"{arch}, profile {options.profile}, seed {options.seed}"
    asked: dict[str, Measurement] = {}
    augmented = [model for how, model in models.items() if not isinstance(how, Recipe)]
    if augmented:
        transfer = place, options, augmented, paper.TEST_EPS, TRANSFER, models[0.0]
        asked[f"the paper's test, {group}"] = tasks.measure, transfer
    for how, model in models.items():
        for attack in sweep.attacks:
            name = f"{attack}, {model_name(arch, how)}, profile {options.profile}"
            given = place, options, [model], (0.0, EPS), attack
            asked[f"{name}, seed {options.seed}"] = tasks.measure, given
    return asked


def _table(
    sweep: Sweep,
    options: Options,
    arch: str,
    trainings: Sequence[Training],
    store: Store | None = None,
) -> pd.DataFrame:
    """Return the rows of `_measurements`, as far as they are known from a store."""
    opened = options.open()
    models = {how: opened.zoo.get(arch, how) for how in trainings}
    table = partial(evaluation.accuracy_table, data=opened.data, store=store or opened.store)
    augmented = [model for how, model in models.items() if not isinstance(how, Recipe)]
    parts = []
    if augmented:
        shown = partial(table, augmented, test_eps=paper.TEST_EPS, attack=TRANSFER)
        parts.append(shown(source=models[0.0]).assign(source_seed=options.seed))
    if first := _other_seed(sweep, options, trainings):
        other = first.open().zoo.get(arch, 0.0)
        control = table([models[0.0]], test_eps=paper.TEST_EPS, attack=TRANSFER, source=other)
        parts.append(control.assign(source_seed=first.seed))
    for attack in sweep.attacks:
        white = table([*models.values()], test_eps=(0.0, EPS), attack=attack)
        parts.append(white.assign(source_seed=options.seed))
    weights = {model.name: model.metadata["weights_hash"] for model in models.values()}
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(weights=rows["model"].map(weights))


def draw(table: Path) -> Path:
    """Draw the table of a sweep into a PNG beside it, and return that.

    Raises:
        ValueError: if it is no table of a sweep.
        OSError: if it cannot be read, or the picture not be written.
    """
    from advlab import plots  # seaborn takes 80 MB; a run of the lessons draws in other processes

    try:
        rows = pd.read_csv(table)
        plots.use_style()
        figure = plots.over_seeds(rows)
    except (KeyError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{table} is no table of a sweep: {error}") from error
    path = table.with_suffix(".png")
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    return path
