"""The whole paper: how long its way would take, beside our runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from advlab import paper
from advlab.bench.measure import PAPERS, Row, once
from advlab.bench.parts import EPOCHS, TABLE
from advlab.checkpoints import read_metadata
from advlab.recipes import file_stem

PART, MODELS = "whole paper", "ten models, two tables"


def _seconds(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the seconds of the paper's way, and ours for crafting and tables alone.

    The paper's ten models: for each architecture a baseline of ten epochs over 50,000 images, four
    augmented ones of ten epochs over 100,000 (half of them crafted in that epoch), and a table of
    five models at six eps over 10,000 images, attacked anew for each.
    """
    rates = {(row.part, row.what, row.way): row.value for row in rows}
    theirs = ours = 0.0
    for arch in paper.TABLES:
        craft = f"one direction, {arch}"
        theirs += EPOCHS * (50_000 + 4 * 100_000) / rates["training", arch, PAPERS]
        theirs += EPOCHS * 4 * 50_000 / rates["crafting", craft, PAPERS]
        theirs += 5 * 6 * 10_000 / rates["evaluation", TABLE, PAPERS]
        ours += 50_000 / rates["crafting", craft, "batched, per-image statistics"]
        ours += 5 * 6 * 10_000 / rates["evaluation", TABLE, "advlab"]
    return theirs, ours


def whole_part(rows: Sequence[Row], home: Path) -> list[Row]:
    """Project the paper's way from the rows measured, and set our own runs beside it.

    Args:
        rows: Of training, crafting and evaluation, both architectures.
        home: The repository, with its checkpoints and the record of the last published run of
            `advlab reproduce`.
    """
    theirs, own = _seconds(rows)

    def ours(recipe: str, training: float, target: float) -> Row:
        seconds = own + training
        return once(
            PART, MODELS, f"advlab, recipe {recipe}", seconds / 3600, "h", against=PAPERS,
            ratio=theirs / seconds, target=target,
            note="training from the models' logs, crafting and tables as measured above",
        )  # fmt: skip

    names = [file_stem(arch, eps, 0) for arch in paper.TABLES for eps in paper.TABLE_TRAIN_EPS]
    shipped = [home / "data" / "checkpoints" / f"{name}.safetensors" for name in names]
    processes = json.loads((home / "figures" / "times.json").read_text(encoding="utf-8"))[
        "processes"
    ]
    trained = sum(read_metadata(path)["seconds"] for path in shipped) / processes
    note = "projected from the steps above and exact counts"
    found = [
        once(PART, MODELS, PAPERS, theirs / 3600, "h", note=note),
        ours("paper", trained, target=7.0),
    ]
    record = home / "figures" / "reproduce.json"
    if not record.is_file():
        return found
    run = json.loads(record.read_text(encoding="utf-8"))
    fast = sum(run["models"][name] for name in names) / run["processes"]
    what = f"advlab reproduce: {len(run['models'])} models, all lessons"
    clock = run["wall_seconds"] / 3600
    note = f"from nothing, on {run['machine']}"
    return [
        *found,
        ours("fast", fast, target=18.0),
        once(PART, what, "wall clock", clock, "h", target=0.5, target_of="at most", note=note),
        once("memory", "advlab reproduce", "all processes", run["peak_mb"], "MB", target=2_000,
             target_of="at most"),
    ]  # fmt: skip
