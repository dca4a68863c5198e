"""Put every shipped model on trial: white-box FGSM and PGD, and AutoAttack.

AutoAttack takes minutes for 100 images of a robust model. Each 100 images that are done are kept in
the cache, so a run that was interrupted goes on from there, and a second one is instant.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from torch import Tensor

from advlab import autoattack, evaluation, files
from advlab.checkpoints import Checkpoint, load
from advlab.comparison import holm, mcnemar
from advlab.lab import Lab
from advlab.store import Store
from advlab.upkeep import readme, tasks
from advlab.upkeep.cluster import Cluster, Scheduler, connect
from advlab.upkeep.graph import Kept, measure
from advlab.upkeep.runs import machine, print_table
from advlab.upkeep.tasks import Options

EPS = 8 / 255
# The paper's best CNN is attacked at smaller sizes too: lesson 06 draws the curve.
SWEPT, SWEEP = "cnn eps=0.2", (1 / 255, 2 / 255, 4 / 255)


def run(
    names: Sequence[str] = (),
    *,
    dataset: str = "auto",
    data_dir: str = "auto",
    device: str = "auto",
    auto_n: int = 1_000,
    best_n: int = 0,
    test_n: int | None = None,
    publish: bool = False,
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure the shipped models under white-box attacks at eps = 8/255; print and write a table.

    A row of what is printed is a model, the best under AutoAttack first. A second table says which
    of them a paired test tells apart (see `compare`).

    Args:
        names: File names of checkpoints, or beginnings of them ("cnn-eps"); all for none.
        dataset, data_dir, device: As in `lab.start`.
        auto_n: Images for AutoAttack and for PGD with restarts, the first of the test split; the
            same for all models. 0 leaves both out.
        best_n: Images for AutoAttack on the two models that are best by `auto_n`; 0 for no more.
        test_n: Images for FGSM and PGD-20; None for all.
        publish: Write audit.csv and audit_pairs.csv, and with `best_n` audit_best.csv, into the
            repository's figures, not into outputs/audit. With `names`, audit_best.csv alone.
        scheduler: Which cluster measures; see `cluster.connect`.

    Raises:
        TaskError, ClusterError: as `graph.measure` and `cluster.connect`.
        ValueError: if no checkpoint is called so, `best_n` has no two models to choose among, or
            other data than CIFAR-10, or the trial of a part of the models, were to be published.
        FileNotFoundError: if it was to be published outside a clone.
        ImportError: without the extra "audit", unless `auto_n` is 0.
    """
    console = console or Console()
    if publish:
        files.clone()
    asked = Options("lesson", dataset, data_dir, device=device).resolved()
    opened = asked.open()
    some = bool(names) and not best_n
    if publish and (not opened.data.papers or some or test_n or not auto_n):
        raise ValueError(
            "--publish writes what the lessons show: all models, all images, on CIFAR-10; of some "
            "models, what --best-n adds"
        )
    chosen = choose_models(names)
    if best_n and (not auto_n or len(chosen) < 2):
        raise ValueError(
            f"best_n is {best_n}, for the two models that AutoAttack leaves most of; there are "
            f"{len(chosen)} models, and auto_n is {auto_n}: give two models or more, and auto_n"
        )
    trials = [_Trial(load(path), opened, auto_n, test_n) for path in chosen]
    known = Kept(opened.store.folder)
    if not all(trial.is_measured(known) for trial in trials):
        with connect(scheduler) as cluster:
            _measure(cluster, asked, trials)
    table = pd.concat([trial.rows(known) for trial in trials], ignore_index=True)
    figures, outputs = (files.home() / name for name in ("figures", "outputs/audit"))
    folder = figures if publish and not names else outputs
    files.write_table(folder / "audit.csv", table)
    if auto_n:
        held = {trial.checkpoint.name: trial.held(EPS, known) for trial in trials}
        files.write_table(folder / "audit_pairs.csv", compare(held))
        if best_n:
            ranked = sorted(trials, key=lambda trial: -int(held[trial.checkpoint.name].sum()))
            best = [replace(trial, auto_n=best_n) for trial in ranked[:2]]
            longer = _longer(best, scheduler)
            files.write_table((figures if publish else outputs) / "audit_best.csv", longer)
    title = f"accuracy %, {table['data'][0]}, white box, L-inf, eps 8/255; {machine()}"
    texts = readme.board_table(table)
    texts.columns = texts.columns.str.replace(" (", "\n(", regex=False)
    print_table(title, texts, console)
    console.print(f"Written: {folder / 'audit.csv'}", soft_wrap=True, markup=False)
    return table


def _longer(best: Sequence["_Trial"], scheduler: Scheduler | None) -> pd.DataFrame:
    """Return how two models do under AutoAttack on more images, and whether they differ there.

    Returns:
        A row a model: model, accuracy, low, high, correct, n; only, the images that it alone
        holds; and p, that of McNemar's test.
    """
    store = best[0].opened.store
    try:
        held = [trial.held(EPS, Kept(store.folder), _refuse) for trial in best]
    except LookupError:
        with connect(scheduler) as cluster:
            held = [trial.held(EPS, store, cluster.map) for trial in best]
    *only, p = mcnemar(*held)
    rows = []
    for trial, found, alone in zip(best, held, only, strict=True):
        correct, n = int(found.sum()), len(found)
        low, high = evaluation.wilson(correct, n)
        rows.append((trial.checkpoint.name, correct / n, low, high, correct, n, alone, p))
    columns = ["model", "accuracy", "low", "high", "correct", "n", "only", "p"]
    return pd.DataFrame(rows, columns=columns)


def compare(held: Mapping[str, Tensor]) -> pd.DataFrame:
    """Compare the models two by two, each pair on the same images (McNemar's exact test).

    Args:
        held: By model, which images AutoAttack leaves right: (N,) bool, in one order. Models that
            hold none are left out: nothing is to be told apart among them.

    Returns:
        A row a pair, the model that holds more first: model, other, model_only and other_only
        (images that only one of the two holds), n, p, and p_corrected for all pairs (Holm).
    """
    names = sorted((name for name in held if held[name].any()), key=lambda name: -held[name].sum())
    rows = []
    for model, other in combinations(names, 2):
        model_only, other_only, p = mcnemar(held[model], held[other])
        n = len(held[model])
        rows.append((model, other, model_only, other_only, n, p))
    columns = ["model", "other", "model_only", "other_only", "n", "p"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_corrected=holm(table["p"].tolist()))


def choose_models(names: Sequence[str]) -> list[Path]:
    """Return the shipped checkpoints whose file names begin with one of `names`; all for none.

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(files.shipped_checkpoints().glob("*.safetensors"))
    chosen = [path for path in paths if not names or path.name.startswith(tuple(names))]
    if not chosen:
        known = ", ".join(path.stem for path in paths)
        raise ValueError(f"no model is called {', '.join(names)}; there are {known or 'none'}")
    return chosen


@dataclass(frozen=True)
class _Trial:
    """A model on trial: `n` images for AutoAttack if `auto_n` is not 0, `test_n` for the others."""

    checkpoint: Checkpoint
    opened: Lab
    auto_n: int
    test_n: int | None

    @property
    def n(self) -> int:
        """Images for AutoAttack."""
        return min(self.auto_n, len(self.opened.data.test))

    def attacks(self) -> dict[str, int | None]:
        """Return how many images each attack of the catalogue gets."""
        # PGD with restarts is to be compared with AutoAttack: on the same images.
        restarts = {"pgd-50x3": self.n} if self.auto_n else {}
        return {"fgsm": self.test_n, "pgd-20": self.test_n, **restarts}

    def rows(self, store: Store, each: autoattack.Each = map) -> pd.DataFrame:
        """Return the rows: clean, FGSM, PGD and, unless `auto_n` is 0, AutoAttack; and the device.

        Args:
            store: Where they are kept.
            each: As in `autoattack.auto_attack`.
        """
        checkpoint, data, parts = self.checkpoint, self.opened.data, []
        checkpoint.model.to(self.opened.device)
        for attack, count in self.attacks().items():
            some = replace(data, test=data.test.first(count))
            parts.append(
                evaluation.accuracy_table(
                    [checkpoint], some, sizes(attack), attack=attack, store=store
                )
            )
        swept = (*SWEEP, EPS) if checkpoint.name == SWEPT else (EPS,)
        for eps in swept if self.auto_n else ():
            found = int(self.held(eps, store, each).sum()), math.nan
            row = evaluation.result_row(
                checkpoint, data.name, eps, "autoattack", evaluation.WHITE_BOX, found, self.n
            )
            parts.append(pd.DataFrame([row]))
        measured = pd.concat(parts, ignore_index=True)
        measured.loc[measured["test_eps"] == 0, "attack"] = "clean"
        return measured.assign(device=self.opened.device.type)

    def held(self, eps: float, store: Store, each: autoattack.Each = map) -> Tensor:
        """Return which of the first `n` test images AutoAttack leaves right: (n,) bool."""
        batch = self.opened.data.test.first(self.n).batch(slice(None))
        model, label = self.checkpoint.model, f"{self.checkpoint.name}, AutoAttack"
        return autoattack.auto_attack(model, *batch, eps, store=store, progress=label, each=each)

    def is_measured(self, known: Store) -> bool:
        """Tell whether a store that computes nothing has all of it."""
        try:
            self.rows(known, _refuse)
        except LookupError:
            return False
        return True


def sizes(attack: str) -> tuple[float, ...]:
    """Return at which eps an attack of the catalogue is measured; clean images count once."""
    return (0.0, EPS) if attack == "fgsm" else (EPS,)


def _refuse(function: Any, parts: Iterable[Any]) -> Iterator[list[bool]]:
    for _ in parts:
        raise LookupError("not measured yet")
    return iter(())


def _measure(cluster: Cluster, options: Options, trials: Sequence[_Trial]) -> None:
    """Let the cluster measure what the store lacks."""
    opened, asked = trials[0].opened, {}
    place = cluster.place(options)
    for trial in trials:
        file = cluster.file(trial.checkpoint.path)
        for attack, n in trial.attacks().items():
            given = place, options, [file], sizes(attack), attack, None, n
            asked[f"{trial.checkpoint.path.stem}, {attack}"] = tasks.measure, given
    measure(cluster, opened.store, asked, "FGSM and PGD")
    for trial in trials:
        trial.rows(opened.store, cluster.map)
