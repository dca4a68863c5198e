"""The audit of anybody's classifier, and the report that it writes."""

import platform
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import advlab
from advlab import files
from advlab.audit import Trial
from advlab.autoattack import COMPARED, VERSIONS, Each, auto_attack, parts_of
from advlab.checkpoints import weights_hash
from advlab.data import ImageData
from advlab.evaluation import wilson
from advlab.upkeep.cluster import Scheduler, connect
from advlab.upkeep.pages import Report, interval, size
from advlab.upkeep.targets import check_fit, first_names, open_data, open_target


@dataclass(frozen=True)
class Settings:
    """What is asked of the audit.

    Args:
        eps, seed: As in `audit.Trial`.
        n: Test images at most, the first ones.
        autoattack: Whether to run AutoAttack too (minutes to hours).
        claim: As in `audit.Trial`.
    """

    eps: float = 8 / 255
    n: int = 500
    seed: int = 0
    autoattack: bool = False
    claim: float | None = None


def audit_model(
    model: nn.Module,
    data: ImageData,
    *,
    name: str,
    output: Path,
    settings: Settings | None = None,
    source: nn.Module | None = None,
    progress: str | None = None,
    each: Each = map,
) -> Report:
    """Put a model on trial, and write report.md, report.html and report.png.

    Args:
        model: Maps (N, C, H, W) in [0, 1] to logits; on the device of the data.
        data: Its first test images are used.
        name: What the report calls the model.
        output: Folder of the report.
        source: Another model, from which attacks are transferred; None leaves that line out.
        progress: Label of AutoAttack's bar; None shows none.
        each: As in `autoattack.auto_attack`.

    Raises:
        ValueError: if the model does not fit the data, a setting is out of range, or AutoAttack is
            asked of a model without a gradient.
        ImportError: if AutoAttack is asked for without the extra "audit".
        OSError: if the report cannot be written.
    """
    settings = settings or Settings()
    outputs = check_fit(model, data)
    if source is not None:
        check_fit(source, data)
    images, labels = data.test.first(min(settings.n, len(data.test))).batch(slice(None))
    how = settings.eps, settings.seed, len(data.classes), settings.claim
    trial = Trial(model, images, labels, source, *how)
    held = None
    if settings.autoattack and not trial.has_gradient:
        raise ValueError(
            "the logits carry no gradient, and AutoAttack needs one; leave it out: the audit "
            "itself runs Square, the part that needs none"
        )
    if settings.autoattack:
        attack = partial(auto_attack, seed=settings.seed, progress=progress, each=each)
        kind = "rand" if trial.random else "standard"
        held = attack(model, images, labels, settings.eps, version=kind)
    checklist, accuracies = trial.checklist(), trial.accuracies()
    if held is not None:
        correct, n = int(held.sum()), len(held)
        row = ("AutoAttack", settings.eps, correct / n, *wilson(correct, n), correct, n)
        accuracies.loc[len(accuracies)] = row
    facts = _facts(model, trial, data, outputs, settings.autoattack)
    summary, distance = _summary(checklist, accuracies), _distance(trial)
    report = Report(name, summary, checklist, accuracies, distance, facts)
    report.write(output)
    return report


def _summary(checklist: pd.DataFrame, accuracies: pd.DataFrame) -> str:
    """Return the first line: whether the model has learned at all, and how many lines passed."""
    clean, verdicts = accuracies.iloc[0], list(checklist["verdict"])
    text = f"Of {len(verdicts)} lines, {verdicts.count('pass')} pass, {verdicts.count('ALARM')} "
    text += f"raise an alarm, {verdicts.count('not run')} were not run."
    if verdicts[0] != "ALARM":
        return text
    return (
        f"The clean accuracy, {100 * clean.accuracy:.1f} % (95 % interval {interval(clean)}), is "
        f"not above chance ({checklist['measured'][0]}). What follows means little before the "
        f"model has learned. {text}"
    )


def _distance(trial: Trial) -> str:
    """Return in a sentence how far from its next mistake the model is; what kept us from asking."""
    lengths = trial.lengths
    if lengths is None or len(lengths) == 0:
        why = "no gradient" if not trial.has_gradient else "answers at random"
        why = why if lengths is None else "no image is right as it is"
        return f"The shortest way out was not looked for: {why}."
    missed = int(lengths.isinf().sum())
    return (
        f"The shortest way out that DeepFool found is {float(lengths.median()):.3g} long in L2, "
        f"the median of {len(lengths):,} images that are right (for {missed:,} it found none, "
        "which counts as infinitely far). It is an upper bound: lesson 09."
    )


def _facts(
    model: nn.Module, trial: Trial, data: ImageData, outputs: int, autoattack: bool
) -> dict[str, str]:
    """Return what was measured, on what and with what: a line each."""
    name = "rand" if trial.random else "standard"
    parts = parts_of(name, outputs)
    told = f"version {name}: {', '.join(parts).upper()} (Square: 5,000 queries)"
    for left in set(VERSIONS[name]).difference(parts):
        told += (
            f"; {left.upper()} was left out: it compares {COMPARED[left]} logits, the model has "
        )
        told += str(outputs)
    packages = f"advlab {advlab.__version__}, torch {torch.__version__}, torchvision "
    packages += f"{version('torchvision')}, Python {platform.python_version()}"
    classes = f"{len(data.classes)} ({first_names(data.classes)})"
    return {
        "model": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "hash of the weights": weights_hash(model),
        "data": data.name,
        "images": f"the first {len(trial.labels):,} test images, {data.shape}",
        "classes": f"{classes}; the model has {outputs} outputs",
        "norm": "L-inf, in units of the pixel range [0, 1]",
        "eps": size(trial.eps),
        "seed": str(trial.seed),
        "device": trial.images.device.type,
        "AutoAttack": told if autoattack else "not run",
        "versions": packages,
    }


def run(
    target: str,
    settings: Settings | None = None,
    *,
    weights: Path | None = None,
    arch: str | None = None,
    source: str | None = None,
    dataset: str = "auto",
    data_dir: str = "auto",
    device: str = "auto",
    output_dir: str = "auto",
    scheduler: Scheduler | None = None,
    console: Console | None = None,
) -> Report:
    """Audit a classifier: print the checklist, write the report.

    Eleven parameters: the options of the command.

    Args:
        target, weights, arch: As in `targets.open_target`: a function is imported and run.
        source: Another target, from which attacks are transferred.
        dataset, data_dir, device: As in `lab.start`.
        output_dir: Folder of the report; "auto": outputs/audit/FOLDER-TARGET-DATASET.
        scheduler: Which cluster runs AutoAttack; see `cluster.connect`.

    Raises:
        ValueError, OSError, ImportError, DataError: as `targets.open_target`, `audit_model` and
            `datasets.load`.
    """
    console, settings = console or Console(), settings or Settings()
    data = open_data(dataset, data_dir, device, settings.n)
    opened = open_target(target, data, weights, arch)
    maker = open_target(source, data, arch=arch).model if source else None
    # With its folder: two people's weights.pth are two reports, in two places.
    name = "/".join(Path(target).absolute().parts[-2:])
    name += f", weights {'/'.join(weights.absolute().parts[-2:])}" if weights else ""
    place = re.sub(r"[^\w.-]+", "-", f"{name}-{data.spec.key}")
    chosen = files.setting(output_dir) or files.home() / "outputs" / "audit" / place
    output = files.results_folder(chosen)
    trial = partial(audit_model, settings=settings, source=maker, progress="AutoAttack")
    with ExitStack() as stack:
        each: Each = map
        if settings.autoattack:
            each = stack.enter_context(connect(scheduler)).map
        report = trial(opened.model, data, name=name, output=output, each=each)
    show(report, output, console)
    return report


def show(report: Report, folder: Path, console: Console) -> None:
    """Print the first line, the checklist, and the folder where the report lies."""
    table = Table("verdict", "check", "measured", box=None, padding=(0, 2, 0, 0))
    for row in report.checklist.itertuples():
        style = {"ALARM": "bold red", "pass": "green"}.get(row.verdict, "dim")
        table.add_row(f"[{style}]{row.verdict}[/]", row.check, row.measured)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(report.summary)
    console.print(table)
    say(report.distance)
    say(f"Written: {folder / 'report.html'} (and report.md, report.png)")
