"""Put every shipped model on trial: white-box FGSM and PGD, and AutoAttack.

AutoAttack takes minutes for 100 images of a robust model. Each 100 images that are done are kept in
the cache, so a run that was interrupted goes on from there, and a second one is instant.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from rich.console import Console

from advlab import autoattack, evaluation, files, lab
from advlab.checkpoints import Checkpoint, load
from advlab.lab import Lab
from advlab.upkeep import readme
from advlab.upkeep.runs import machine, print_table

EPS = 8 / 255
# The paper's best CNN is attacked at smaller sizes too: lesson 06 draws the curve.
SWEPT, SWEEP = "cnn eps=0.2", (1 / 255, 2 / 255, 4 / 255)
# The model that the README's claim is about gets twice as many images for AutoAttack.
BEST = "cnn robust"


def run(
    names: Sequence[str] = (),
    *,
    dataset: str = "auto",
    data_dir: str = "auto",
    device: str = "auto",
    auto_n: int = 1_000,
    test_n: int | None = None,
    publish: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure the shipped models under white-box attacks at eps = 8/255; print and write a table.

    A row of what is printed is a model, the best under AutoAttack first.

    Args:
        names: File names of checkpoints, or beginnings of them ("cnn-eps"); all for none.
        dataset, data_dir, device: As in `lab.start`.
        auto_n: Images for AutoAttack and for PGD with restarts, the first of the test split (twice
            as many for the model `BEST`); 0 leaves both out.
        test_n: Images for FGSM and PGD-20; None for all.
        publish: Write figures/audit.csv of the repository, not outputs/audit/audit.csv.

    Raises:
        ValueError: if no checkpoint is called so, or other data than CIFAR-10 or a part of the
            models were to be published.
        ImportError: without the extra "audit", unless `auto_n` is 0.
    """
    console = console or Console()
    opened = lab.start("lesson", dataset, data_dir=data_dir, device=device, progress=False)
    if publish and (not opened.data.papers or names or test_n or not auto_n):
        raise ValueError(
            "--publish writes what the lessons show: all models, all images, on CIFAR-10"
        )
    chosen, parts = choose_models(names), []
    for number, path in enumerate(chosen, 1):
        label = f"[{number}/{len(chosen)}] "
        parts.append(measure(load(path), opened, auto_n, test_n, label))
    table = pd.concat(parts, ignore_index=True)
    folder = files.home() / ("figures" if publish else "outputs/audit")
    files.write_table(folder / "audit.csv", table)
    title = f"accuracy %, {table['data'][0]}, white box, L-inf, eps 8/255; {machine()}"
    texts = readme.board_table(table)
    texts.columns = texts.columns.str.replace(" (", "\n(", regex=False)
    print_table(title, texts, console)
    console.print(f"Written: {folder / 'audit.csv'}", soft_wrap=True, markup=False)
    return table


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


def measure(
    checkpoint: Checkpoint, opened: Lab, auto_n: int, test_n: int | None, label: str
) -> pd.DataFrame:
    """Return one model's rows: clean, FGSM, PGD and, unless `auto_n` is 0, AutoAttack."""
    name, data, parts = checkpoint.name, opened.data, []
    checkpoint.model.to(opened.device)
    n = min(2 * auto_n if name == BEST else auto_n, len(data.test))
    # PGD with restarts is to be compared with AutoAttack: on the same images.
    attacks = {"fgsm": test_n, "pgd-20": test_n} | ({"pgd-50x3": n} if auto_n else {})
    for attack, count in attacks.items():
        some = replace(data, test=data.test.first(count))
        sizes = (0.0, EPS) if attack == "fgsm" else (EPS,)
        table = partial(evaluation.accuracy_table, attack=attack, store=opened.store)
        parts.append(table([checkpoint], some, sizes, progress=f"{label}{name}, {attack}"))
    if auto_n:
        batch = data.test.first(n).batch(slice(None))
        strongest = partial(
            autoattack.auto_attack, store=opened.store, progress=f"{label}{name}, AutoAttack"
        )
        for eps in (*SWEEP, EPS) if name == SWEPT else (EPS,):
            found = int(strongest(checkpoint.model, *batch, eps).sum()), math.nan
            row = evaluation.result_row(
                checkpoint, data.name, eps, "autoattack", evaluation.WHITE_BOX, found, n
            )
            parts.append(pd.DataFrame([row]))
    measured = pd.concat(parts, ignore_index=True)
    measured.loc[measured["test_eps"] == 0, "attack"] = "clean"
    return measured
