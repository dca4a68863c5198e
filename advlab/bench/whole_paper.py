"""The whole paper: how long its way would take on this machine, beside ours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from advlab import paper
from advlab.bench.measure import PAPERS, Row, once
from advlab.bench.parts import TABLE, on_every_core
from advlab.recipes import FAST, PAPER, Recipe
from advlab.upkeep.runs import machine

PART, MODELS = "whole paper", "ten models, two tables"
# Of one architecture: images of the training split, models beside the baseline, and images of all
# cells of its table.
TRAIN_N, AUGMENTED = 50_000, len(paper.TABLE_TRAIN_EPS) - 1
CELLS = 10_000 * len(paper.TABLE_TRAIN_EPS) * len(paper.TEST_EPS)
Rates = Mapping[tuple[str, str, str], float]


def _trained(recipe: Recipe) -> int:
    """Return how many images one architecture's models see; an augmented set is twice as large."""
    later = recipe.for_augmented_set()
    return TRAIN_N * (recipe.epochs + AUGMENTED * 2 * later.epochs)


def _papers_seconds(rates: Rates) -> float:
    """Return the seconds of the paper's way.

    Half of the images of an augmented set are crafted anew in each epoch, and a table attacks the
    test images anew for each of its cells.
    """
    crafted = TRAIN_N * AUGMENTED * PAPER.epochs
    return sum(
        _trained(PAPER) / rates["training", arch, PAPERS]
        + crafted / rates["crafting", f"one direction, {arch}", PAPERS]
        + CELLS / rates["evaluation", TABLE, PAPERS]
        for arch in paper.TABLES
    )


def _our_seconds(rates: Rates, recipe: Recipe) -> float:
    """Return the seconds of advlab: one direction an architecture, trainings on every core."""
    return sum(
        _trained(recipe) / rates["training", arch, on_every_core(recipe.batch_size)]
        + TRAIN_N / rates["crafting", f"one direction, {arch}", "batched, per-image statistics"]
        + CELLS / rates["evaluation", TABLE, "advlab"]
        for arch in paper.TABLES
    )


def whole_part(rows: Sequence[Row], home: Path) -> list[Row]:
    """Project both ways from the rows measured; add the last `advlab reproduce` of this machine.

    Args:
        rows: Of training, crafting and evaluation, both architectures, on this machine.
        home: The repository, with the record of the last published run of `advlab reproduce`.

    Raises:
        ValueError: if a row is missing.
    """
    rates = {(row.part, row.what, row.way): row.value for row in rows}
    note = "projected from the steps above and exact counts"
    try:
        theirs = _papers_seconds(rates)
        found = [once(PART, MODELS, PAPERS, theirs / 3600, "h", note=note)]
        for recipe, target in ((PAPER, 7.0), (FAST, 18.0)):
            ours = _our_seconds(rates, recipe)
            found.append(
                once(
                    PART, MODELS, f"advlab, recipe {recipe.name}", ours / 3600, "h",
                    against=PAPERS, ratio=theirs / ours, target=target, note=note,
                )
            )  # fmt: skip
    except KeyError as error:
        raise ValueError(
            f"{' '.join(error.args[0])!r} was not measured on this machine ({machine()}); measure "
            'training, crafting and evaluation with it: --only "training,crafting,evaluation,whole"'
        ) from None
    record = home / "figures" / "reproduce.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if run.get("machine") != machine():
        return found
    what = f"advlab reproduce: {len(run['models'])} models, all lessons"
    clock = run["wall_seconds"] / 3600
    return [
        *found,
        once(PART, what, "wall clock", clock, "h", target=0.5, target_of="at most",
             note="from nothing"),
        once("memory", "advlab reproduce", "all processes", run["peak_mb"], "MB", target=2_000,
             target_of="at most"),
    ]  # fmt: skip
