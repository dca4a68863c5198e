"""The command `advlab`."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console

app = typer.Typer(
    help="Learn, by running it, how neural networks are fooled and defended.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Profile = Annotated[str, typer.Option(help="quick, lesson, fast or paper.")]
Dataset = Annotated[str, typer.Option(help="cifar10, shapes10, or auto: CIFAR-10 if to be had.")]
DataDir = Annotated[str, typer.Option(help="Folder that holds cifar-10-batches-py.")]


def _fail(error: Exception) -> NoReturn:
    errors.print(f"advlab: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


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
    profile: Profile = "auto",
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of results; auto: outputs/PROFILE-DATASET.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order, flips, noise.")] = 0,
    param: Annotated[
        list[str] | None, typer.Option(help="name=value, a parameter of the lessons; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished lesson.")
    ] = False,
) -> None:
    """Run lessons with papermill and print the paper's tables beside ours."""
    from advlab.tools import batch

    try:
        batch.run(
            lessons or (),
            profile=profile,
            dataset=dataset,
            data_dir=data_dir,
            output_dir=output_dir,
            seed=seed,
            parameters=parse_parameters(param or []),
            resume=resume,
            console=console,
        )
    except (batch.BatchError, RuntimeError, ValueError, OSError) as error:
        _fail(error)


@app.command()
def retrain(
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted retraining finished.")
    ] = False,
) -> None:
    """Train all models again by the paper's recipe (hours); refresh notebooks and figures."""
    from advlab.tools import batch

    try:
        batch.retrain(resume=resume, console=console)
    except (RuntimeError, ValueError, OSError) as error:
        _fail(error)


@app.command()
def reproduce(
    seeds: Annotated[
        int, typer.Option(min=1, help="Train the ten models of Tables 1 and 2 this many times.")
    ] = 1,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted run finished.")
    ] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Refresh clock and table of seeds in figures/.")
    ] = False,
) -> None:
    """Rebuild the whole paper from nothing by the recipe FAST (half an hour on two cores)."""
    from advlab.tools import batch

    try:
        batch.reproduce(
            seeds,
            dataset=dataset,
            data_dir=data_dir,
            resume=resume,
            publish=publish,
            console=console,
        )
    except (RuntimeError, ValueError, OSError) as error:
        _fail(error)


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

    try:
        benchmark.run(dataset, data_dir, output_dir, rounds, publish, console)
    except (RuntimeError, ValueError, OSError) as error:
        _fail(error)


@app.command()
def audit(
    models: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of checkpoints' names; all for none.")
    ] = None,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    auto_n: Annotated[
        int, typer.Option(min=0, help="Test images for AutoAttack; 0 leaves it out.")
    ] = 1_000,
    test_n: Annotated[
        int | None, typer.Option(help="Test images for FGSM and PGD-20; all for none.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write figures/audit.csv, which the lessons show.")
    ] = False,
) -> None:
    """Attack the shipped models white box: FGSM, PGD-20, AutoAttack (hours; resumes by itself)."""
    from advlab.tools import audit as trial

    try:
        trial.run(
            models or (),
            dataset=dataset,
            data_dir=data_dir,
            auto_n=auto_n,
            test_n=test_n,
            publish=publish,
            console=console,
        )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        _fail(error)


challenge = typer.Typer(help="The open challenge of lesson 08.", no_args_is_help=True)
app.add_typer(challenge, name="challenge")


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

    try:
        row = arena.score(submission, dataset=dataset, data_dir=data_dir)
    except (RuntimeError, ValueError, OSError) as error:
        _fail(error)
    console.print(
        f"{row['kind']} on {row['data']}: {row['correct']} of {row['n']} images hold "
        f"({100 * row['accuracy']:.1f} %, 95 % interval {100 * row['low']:.1f} to "
        f"{100 * row['high']:.1f}); the reference: {100 * row['reference']:.1f} %. "
        f"{'Better than the reference.' if row['better'] else 'Not better than the reference.'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


course = typer.Typer(help="Assignments: student versions, and grading.", no_args_is_help=True)
app.add_typer(course, name="course")


@course.command()
def build(
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/course.")] = None,
) -> None:
    """Make the student version of each assignment, and a zip of each."""
    from advlab import files
    from advlab.classroom import course as classroom

    try:
        zips = classroom.build(output or files.home() / "outputs" / "course")
    except (classroom.CourseError, OSError) as error:
        _fail(error)
    for path in zips:
        console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)


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
    from advlab import files
    from advlab.classroom import course as classroom

    try:
        table = classroom.grade(
            folder,
            output or files.home() / "outputs" / "grades",
            sandbox=sandbox,
            jobs=jobs,
            marks=marks,
            console=console,
        )
    except (classroom.CourseError, OSError) as error:
        _fail(error)
    totals = table.groupby(["student", "assignment"])[["score", "points"]].sum()
    console.print(totals.to_string(), markup=False, highlight=False)


@app.command()
def doctor() -> None:
    """Check Python, packages, data, checkpoints and machine; exit code 1 if anything fails."""
    from advlab.tools.doctor import run_checks

    checks = run_checks()
    for check in checks:
        mark = "[OK]  " if check.ok else "[FAIL]"
        console.print(
            f"{mark} {check.name:<18} {check.detail}", markup=False, highlight=False, soft_wrap=True
        )
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    weights: Annotated[list[Path], typer.Argument(help=".safetensors or .pth files.")],
    arch: Annotated[str, typer.Option(help="cnn, cnn-lstm or cnn-lstm-positions.")],
    source: Annotated[
        Path | None,
        typer.Option(help="Weights whose gradient makes the attacked images; else each its own."),
    ] = None,
    attack: Annotated[
        str, typer.Option(help="fgsm, fgsm-per-image (as in the paper) or noise.")
    ] = "fgsm",
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    test_n: Annotated[int | None, typer.Option(help="Test images; all for none.")] = None,
) -> None:
    """Print the accuracy of any weights, clean and under FGSM."""
    from advlab import data, evaluation, paper, session
    from advlab.checkpoints import load_weights

    try:
        targets = [load_weights(path, arch) for path in weights]
        maker = load_weights(source, arch) if source else None
        folder = session.setting(data_dir, "", "") or None
        images = data.load(dataset, folder, train_n=1, test_n=test_n)
        table = evaluation.accuracy_table(
            targets, images, paper.TEST_EPS, attack=attack, source=maker, progress="evaluating"
        )
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        _fail(error)
    lines = [
        f"accuracy % on {len(images.test):,} {images.name} test images; {attack}, "
        f"{f'transfer from {source.name}' if source else 'white box'}"
    ]
    percent = table.assign(accuracy=100 * table["accuracy"])
    wide = percent.pivot(index="model", columns="test_eps", values="accuracy")
    lines.append(wide.to_string(float_format="%.1f"))
    lines += [
        f"{row.model}: clean {row.correct}/{row.n}, 95 % interval "
        f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        for row in table[table["test_eps"] == 0].itertuples()
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
