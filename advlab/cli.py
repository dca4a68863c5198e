"""The commands of `advlab`: what they choose from is what the package declares.

Each option is a parameter of its command, however many that makes.
"""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup

from advlab import data, evaluation, files, models, paper, session
from advlab.checkpoints import load_weights
from advlab.machine import DEVICES
from advlab.upkeep import doctor as checkup
from advlab.upkeep.processes import environment
from advlab.upkeep.train import Options

console = Console()
errors = Console(stderr=True)


class Group(TyperGroup):
    """Commands that end with the message alone for what their user can mend."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (RuntimeError, ValueError, TypeError, OSError, ImportError) as error:
            text = f"advlab: {error}"
            errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Group,
    help="Learn, by running it, how neural networks are fooled and defended.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
challenge = typer.Typer(help="The open challenge of lesson 08.", no_args_is_help=True)
app.add_typer(challenge, name="challenge")
course = typer.Typer(help="Assignments: student versions, and grading.", no_args_is_help=True)
app.add_typer(course, name="course")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _choice(name: str, values: Iterable[str]) -> type[StrEnum]:
    return StrEnum(name, {value: value for value in values})


ProfileName = _choice("ProfileName", ["auto", *session.PROFILES])
DeviceName = _choice("DeviceName", DEVICES)
ArchName = _choice("ArchName", models.ARCHITECTURES)
AttackName = _choice("AttackName", evaluation.ATTACKS)

Profile = Annotated[ProfileName, typer.Option(help="How much of everything.")]
Dataset = Annotated[
    str, typer.Option(help=f"{', '.join(data.DATASETS)}, or auto: CIFAR-10 if to be had.")
]
DataDir = Annotated[str, typer.Option(help="Folder that holds cifar-10-batches-py.")]
Device = Annotated[DeviceName, typer.Option(help="Where to compute; auto: a GPU if there is one.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run finished.")]


def parse_parameters(texts: list[str]) -> dict[str, Any]:
    """Parse k=v texts, values as YAML (numbers, booleans, lists, text).

    Raises:
        ValueError: for a text that is not k=v.
    """
    parameters = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ValueError(f"--param {text!r} is not of the form name=value")
        parameters[name] = yaml.safe_load(value)
    return parameters


@app.command()
def run(
    lessons: Annotated[
        list[str] | None,
        typer.Argument(help="Such as 02_fgsm, 02, fgsm, or solutions; all lessons for none."),
    ] = None,
    profile: Profile = ProfileName.auto,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of results; auto: outputs/PROFILE-DATASET.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order, flips, noise.")] = 0,
    device: Device = DeviceName.auto,
    param: Annotated[
        list[str] | None, typer.Option(help="name=value, a parameter of the lessons; repeatable.")
    ] = None,
    resume: Resume = False,
) -> None:
    """Run lessons with papermill and print the paper's tables beside ours."""
    from advlab.upkeep import runs

    options = Options(profile.value, dataset, data_dir, output_dir, seed, device.value)
    given = parse_parameters(param or [])
    runs.run(lessons or (), options, parameters=given, resume=resume, console=console)


@app.command()
def retrain(resume: Resume = False) -> None:
    """Train all models again by the paper's recipe (hours); refresh notebooks and figures."""
    from advlab.upkeep import publish

    publish.retrain(resume=resume, console=console)


@app.command()
def reproduce(
    seeds: Annotated[
        int, typer.Option(min=1, help="Train the ten models of Tables 1 and 2 this many times.")
    ] = 1,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    resume: Resume = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Refresh clock and table of seeds in figures/.")
    ] = False,
) -> None:
    """Rebuild the whole paper from nothing by the recipe FAST (half an hour on two cores)."""
    from advlab.upkeep import publish as publishing

    places = {"dataset": dataset, "data_dir": data_dir}
    publishing.reproduce(seeds, **places, resume=resume, publish=publish, console=console)


@app.command()
def bench(
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of bench.csv and bench.png; auto: outputs/bench.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each way.")] = 5,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write into figures/ and refresh README.md.")
    ] = False,
) -> None:
    """Measure advlab beside the paper's way and other libraries (minutes, on a quiet machine)."""
    from advlab.bench import run as benchmark

    benchmark.run(dataset, data_dir, output_dir, rounds, publish, console)


@app.command()
def audit(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of checkpoints' names; all for none.")
    ] = None,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    device: Device = DeviceName.auto,
    auto_n: Annotated[
        int, typer.Option(min=0, help="Test images for AutoAttack; 0 leaves it out.")
    ] = 1_000,
    test_n: Annotated[
        int | None, typer.Option(min=1, help="Test images for FGSM and PGD-20; all for none.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write figures/audit.csv, which the lessons show.")
    ] = False,
) -> None:
    """Attack the shipped models white box: FGSM, PGD-20, AutoAttack (hours; resumes by itself)."""
    from advlab.upkeep import trial

    places = {"dataset": dataset, "data_dir": data_dir, "device": device.value}
    numbers = {"auto_n": auto_n, "test_n": test_n}
    trial.run(checkpoints or (), **places, **numbers, publish=publish, console=console)


@challenge.callback()
def _challenge() -> None:
    """Keep `score` a subcommand: typer would drop the name of a command that is alone."""


@challenge.command()
def score(
    submission: Annotated[Path, typer.Argument(help="An attack, or weights of a defence.")],
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
) -> None:
    """Check a submission, score it, and append it to outputs/challenge/leaderboard.csv."""
    from advlab.classroom import challenge as arena

    row = arena.score(submission, dataset=dataset, data_dir=data_dir)
    _say(
        f"{row['kind']} on {row['data']}: {row['correct']} of {row['n']} images hold "
        f"({100 * row['accuracy']:.1f} %, 95 % interval {100 * row['low']:.1f} to "
        f"{100 * row['high']:.1f}); the reference: {100 * row['reference']:.1f} %. "
        f"{'Better than the reference.' if row['better'] else 'Not better than the reference.'}"
    )


@course.command()
def build(
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/course.")] = None,
) -> None:
    """Make the student version of each assignment, and a zip of each."""
    from advlab.classroom import course as classroom

    for path in classroom.build(output or files.home() / "outputs" / "course"):
        _say(f"Written: {path}")


@course.command()
def grade(
    folder: Annotated[Path, typer.Argument(help="STUDENT/a2/a2.ipynb, or STUDENT_a2.ipynb.")],
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/grades.")] = None,
    sandbox: Annotated[bool, typer.Option(help="Run the notebooks under bubblewrap.")] = True,
    jobs: Annotated[int | None, typer.Option(min=1, help="At a time; else one a core.")] = None,
    marks: Annotated[
        Path | None, typer.Option(help="CSV: student, assignment, cell, score given by hand.")
    ] = None,
) -> None:
    """Grade a folder of submissions: grades.csv, and a page of feedback for each student."""
    from advlab.classroom import course as classroom

    kept = output or files.home() / "outputs" / "grades"
    how = {"sandbox": sandbox, "jobs": jobs, "marks": marks}
    table = classroom.grade(folder, kept, **how, console=console)
    totals = table.groupby(["student", "assignment"])[["score", "points"]].sum()
    console.print(totals.to_string(), markup=False, highlight=False)


@app.command()
def doctor() -> None:
    """Check Python, packages, data, checkpoints and machine; exit code 1 if anything fails."""
    checks = checkup.run_checks()
    _say(checkup.report(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    weights: Annotated[list[Path], typer.Argument(help=".safetensors or .pth files.")],
    arch: Annotated[ArchName, typer.Option(help="The network that they are of.")],
    source: Annotated[
        Path | None,
        typer.Option(help="Weights whose gradient makes the attacked images; else each its own."),
    ] = None,
    attack: Annotated[AttackName, typer.Option(help="As in the lessons.")] = AttackName.fgsm,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    device: Device = DeviceName.auto,
    test_n: Annotated[int | None, typer.Option(min=1, help="Test images; all for none.")] = None,
) -> None:
    """Print the accuracy of any weights, clean and attacked."""
    with environment(ADVLAB_DEVICE=session.setting(device.value, "ADVLAB_DEVICE", "auto")):
        targets = [load_weights(path, arch.value) for path in weights]
        maker = load_weights(source, arch.value) if source else None
        folder = session.setting(data_dir, "", "") or None
        images = data.load(dataset, folder, train_n=1, test_n=test_n)
        how = {"attack": attack.value, "source": maker, "progress": "evaluating"}
        table = evaluation.accuracy_table(targets, images, paper.TEST_EPS, **how)
    made_by = f"transfer from {source.name}" if source else "white box"
    _say(f"accuracy % on {len(images.test):,} {images.name} test images; {attack}, {made_by}")
    percent = table.assign(accuracy=100 * table["accuracy"])
    wide = percent.pivot(index="model", columns="test_eps", values="accuracy")
    _say(wide.to_string(float_format="%.1f"))
    for row in table[table["test_eps"] == 0].itertuples():
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        _say(f"{row.model}: clean {row.correct}/{row.n}, 95 % interval {interval}")
