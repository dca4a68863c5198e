"""The commands of `advlab`: what they choose from is what the package declares.

Each option is a parameter of its command, however many that makes.
"""

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial, update_wrapper
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, cast

import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup

from advlab import evaluation, files, paper
from advlab.catalogue import ARCHITECTURES, ATTACKS, DATASETS
from advlab.machine import DEVICES
from advlab.recipes import PROFILES
from advlab.upkeep import doctor as checkup
from advlab.upkeep.cluster import Scheduler
from advlab.upkeep.targets import is_target, open_data, open_target, parse_eps
from advlab.upkeep.tasks import Options

console = Console()
errors = Console(stderr=True)


class Group(TyperGroup):
    """Commands that end with the message alone for what their user can mend."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (
            KeyboardInterrupt,
            RuntimeError,
            ValueError,
            TypeError,
            OSError,
            ImportError,
        ) as error:
            if _is_interruption(error):
                told = "go on with the same command, and --resume where it has that"
                errors.print(f"advlab: stopped. What is finished is kept; {told}", soft_wrap=True)
                raise typer.Exit(130) from None
            text = f"advlab: {error}"
            errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


def _is_interruption(error: BaseException | None) -> bool:
    """Tell whether an error is a Ctrl-C, or what came of one: a lock that it broke into, say."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


cluster_option = partial(typer.Option, rich_help_panel="Where to compute")


def on_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, as its parameter `scheduler`, what these options say."""

    def with_options(
        *,
        scheduler: Annotated[
            str,
            cluster_option(
                help="Address of a Dask scheduler, tls://HOST:8786; auto: ADVLAB_SCHEDULER, or "
                "a cluster of this machine's own cores."
            ),
        ] = "auto",
        tls_ca: Annotated[
            str | None, cluster_option(help="Certificate authority of that scheduler.")
        ] = None,
        tls_cert: Annotated[
            str | None, cluster_option(help="Certificate that shows who you are.")
        ] = None,
        tls_key: Annotated[str | None, cluster_option(help="Its key.")] = None,
        insecure: Annotated[
            bool,
            cluster_option(
                "--insecure", help="Accept one without TLS: who reaches it can run code as you."
            ),
        ] = False,
        **given: Any,
    ) -> None:
        asked = Scheduler(scheduler, tls_ca, tls_cert, tls_key, insecure)
        command(**given, scheduler=asked)

    options = signature(with_options)
    update_wrapper(with_options, command)
    parameters = {**signature(command).parameters, **options.parameters}
    del parameters["given"]
    shown = options.replace(parameters=[*parameters.values()])
    with_options.__signature__ = shown  # type: ignore[attr-defined]
    with_options.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return with_options


app = typer.Typer(
    cls=Group,
    help="Learn, by running it, how neural networks are fooled and defended.",
    epilog="In a clone, `python -m advlab setup` makes the environment .venv from Python alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
challenge = typer.Typer(help="The open challenge of lesson 08.", no_args_is_help=True)
app.add_typer(challenge, name="challenge")
course = typer.Typer(
    help="Assignments: student versions, checks before they are handed in, and grading.",
    no_args_is_help=True,
)
app.add_typer(course, name="course")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _choice(name: str, values: Iterable[str]) -> type[StrEnum]:
    return cast("type[StrEnum]", StrEnum(name, {value: value for value in values}))


ProfileName = _choice("ProfileName", ["auto", *PROFILES])
DeviceName = _choice("DeviceName", DEVICES)
ArchName = _choice("ArchName", ARCHITECTURES)
AttackName = _choice("AttackName", ATTACKS)
Kept = _choice("Kept", ["last", "best"])
ANY_PROFILE, ANY_DEVICE, FGSM = ProfileName("auto"), DeviceName("auto"), AttackName("fgsm")
LAST = Kept("last")

Profile = Annotated[ProfileName, typer.Option(help="How much of everything.")]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        "--data",
        help=f"{', '.join(DATASETS)}, folder:PATH\\[@SIZE], or auto: CIFAR-10 if to be had.",
    ),
]
DataDir = Annotated[str, typer.Option(help="Folder that holds the files of the data set.")]
Device = Annotated[DeviceName, typer.Option(help="Where to compute; auto: a GPU if there is one.")]
own_option = partial(typer.Option, rich_help_panel="Your own model (with TARGET)")
shipped_option = partial(typer.Option, rich_help_panel="The shipped models")
TARGET_HELP = (
    "FILE.py:FUNCTION, which returns an nn.Module: the file is imported and its code runs, so "
    "name only files that you trust; or a weights file of one of our architectures"
)
Arch = Annotated[
    ArchName | None, typer.Option(help="Architecture of a weights file that does not say it.")
]
OwnWeights = Annotated[
    Path | None, typer.Option(help="Weights for FUNCTION's model: any .pth or .safetensors.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run finished.")]


def parse_parameters(texts: list[str]) -> dict[str, Any]:
    """Parse k=v texts, values as YAML (numbers, booleans, lists, text).

    Raises:
        ValueError: for a text that is not k=v, or whose value is none of those.
    """
    parameters = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ValueError(f"--param {text!r} is not of the form name=value")
        parameters[name] = _parse_value(text, value)
    return parameters


def _parse_value(text: str, value: str) -> Any:
    if re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
        return float(value)  # YAML knows 1.0e-3 alone
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = {}
    plain = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(one, str | float | int | None) for one in plain):
        raise ValueError(
            f"--param {text!r}: the value is no number, true or false, list of these, or plain "
            "text; to give it as text, put it into quotes of its own: --param 'name=\"TEXT\"'"
        )
    return parsed


@app.command()
@on_cluster
def run(
    lessons: Annotated[
        list[str] | None,
        typer.Argument(help="Such as 02_fgsm, 02, fgsm, or solutions; all lessons for none."),
    ] = None,
    profile: Profile = ANY_PROFILE,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of results; auto: outputs/PROFILE-DATASET.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order, flips, noise.")] = 0,
    device: Device = ANY_DEVICE,
    param: Annotated[
        list[str] | None, typer.Option(help="name=value, a parameter of the lessons; repeatable.")
    ] = None,
    resume: Resume = False,
    *,
    scheduler: Scheduler,
) -> None:
    """Run lessons with papermill and print the paper's tables beside ours."""
    from advlab.upkeep import runs

    options = Options(str(profile), dataset, data_dir, output_dir, seed, str(device))
    given = parse_parameters(param or [])
    on: dict[str, Any] = {"scheduler": scheduler, "console": console}
    runs.run(lessons or (), options, parameters=given, resume=resume, **on)


@app.command()
def lessons(
    folder: Annotated[Path, typer.Argument(help="Gets the copy.")] = Path("lessons"),
) -> None:
    """Copy the lessons and their solutions, to open in JupyterLab; what is there is kept."""
    from advlab.upkeep import anywhere

    for path, new in anywhere.copy_lessons(folder):
        _say(f"Written: {path}" if new else f"Kept as it is: {path}")
    _say(f"Open them: jupyter lab {folder}")


@app.command()
def links() -> None:
    """Write badges, links and the cell for Colab anew, by the address in pyproject.toml."""
    from advlab.upkeep import anywhere

    anywhere.refresh()
    _say("Refreshed README.md and notebooks.")


@app.command()
@on_cluster
def retrain(resume: Resume = False, *, scheduler: Scheduler) -> None:
    """Train all models again by the paper's recipe (hours); refresh notebooks and figures."""
    from advlab.upkeep import publish

    publish.retrain(resume=resume, scheduler=scheduler, console=console)


@app.command(name="time")
def time_lessons() -> None:
    """Time all lessons on CIFAR-10, on a quiet machine; refresh headers and pages (minutes)."""
    from advlab.upkeep import publish

    publish.time_lessons(console=console)
    _say("Refreshed figures/times.json, the lessons' headers and the pages that show them.")


@app.command()
@on_cluster
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
    *,
    scheduler: Scheduler,
) -> None:
    """Rebuild the whole paper from nothing by the recipe FAST (30 to 40 minutes)."""
    from advlab.upkeep import publish as publishing

    places: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir}
    places |= {"scheduler": scheduler, "console": console}
    publishing.reproduce(seeds, **places, resume=resume, publish=publish)


@app.command()
@on_cluster
def sweep(
    file: Annotated[
        Path | None, typer.Argument(help="YAML, with the options below: 'seeds: [0, 1]'.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Such as paper,fast,robust.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0-4, or 0,2.")] = None,
    train_eps: Annotated[
        str | None, typer.Option(help="Of augmented models, such as 0.005,0.2.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Such as cnn,cnn-lstm.")] = None,
    attack: Annotated[str | None, typer.Option(help="White box, such as fgsm,pgd-20.")] = None,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of results; auto: outputs/sweep-DATASET.")
    ] = "auto",
    device: Device = ANY_DEVICE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it costs.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write what lessons and README show into figures/.")
    ] = False,
    *,
    scheduler: Scheduler,
) -> None:
    """Train and measure recipes x seeds x eps x architectures; goes on where it was stopped."""
    from advlab.upkeep import sweep as sweeping

    names = ("recipes", "seeds", "train_eps", "archs", "attacks")
    options = dict(zip(names, (recipe, seeds, train_eps, arch, attack), strict=True))
    asked = {} if file is None else sweeping.read_file(file)
    asked |= {name: text for name, text in options.items() if text is not None}
    base = sweeping.options(dataset, data_dir, output_dir, str(device))
    on: dict[str, Any] = {"scheduler": scheduler, "console": console}
    sweeping.run(sweeping.parse(asked.items()), base, dry=dry_run, publish=publish, **on)


@app.command()
@on_cluster
def search(
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of models and table; auto: outputs/search-DATASET.")
    ] = "auto",
    device: Device = ANY_DEVICE,
    publish: Annotated[bool, typer.Option("--publish", help="Write figures/search.csv.")] = False,
    *,
    scheduler: Scheduler,
) -> None:
    """Train by each change that led to the recipe robust-soft; judge on held-out images."""
    from advlab.upkeep import search as searching

    places: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "output_dir": output_dir}
    on: dict[str, Any] = {"device": str(device), "scheduler": scheduler, "console": console}
    searching.run(epochs=epochs, seed=seed, publish=publish, **places, **on)


@app.command()
def plot(
    table: Annotated[Path, typer.Argument(help="sweep.csv, as `advlab sweep` wrote it.")],
) -> None:
    """Draw the table of a sweep: means and ranges over its seeds."""
    from advlab.upkeep import sweep as sweeping

    _say(f"Written: {sweeping.draw(table)}")


@app.command()
def bench(
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    output_dir: Annotated[
        str, typer.Option(help="Folder of bench.csv and bench.png; auto: outputs/bench.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each way.")] = 5,
    publish: Annotated[
        bool,
        typer.Option("--publish", help="Write into figures/ and refresh the pages that show it."),
    ] = False,
    only: Annotated[
        str, typer.Option(help="Parts to measure, such as 'training,workers'; all for none.")
    ] = "",
) -> None:
    """Measure advlab beside the paper's way and other libraries (minutes, on a quiet machine)."""
    from advlab.bench import run as benchmark

    parts = [name.strip() for name in only.split(",") if name.strip()]
    benchmark.run(dataset, data_dir, output_dir, rounds, publish, parts, console)


@app.command()
@on_cluster
def audit(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{TARGET_HELP}; or beginnings of shipped models' names; all for none."
        ),
    ] = None,
    weights: OwnWeights = None,
    arch: Arch = None,
    source: Annotated[
        str | None, own_option(help="Another TARGET, from which attacks are transferred.")
    ] = None,
    eps: Annotated[str, own_option(help="Size of the attacks: 8/255 or 0.03.")] = "8/255",
    n: Annotated[int, own_option("-n", "--images", min=1, help="Test images.")] = 500,
    autoattack: Annotated[bool, own_option("--autoattack", help="AutoAttack too (long).")] = False,
    seed: Annotated[int, own_option(min=0, help="Of noise and random starts.")] = 0,
    claim: Annotated[
        float | None,
        own_option(min=0, max=1, help="Accuracy that is claimed within eps, such as 0.45."),
    ] = None,
    output_dir: Annotated[
        str, own_option(help="Folder of the report; auto: outputs/audit/FOLDER-TARGET-DATASET.")
    ] = "auto",
    auto_n: Annotated[int, shipped_option(min=0, help="Images for AutoAttack; 0: none.")] = 1_000,
    test_n: Annotated[
        int | None, shipped_option(min=1, help="Images for FGSM and PGD-20; all for none.")
    ] = None,
    best_n: Annotated[
        int, shipped_option(min=0, help="Images for AutoAttack on the two best; 0: as the others.")
    ] = 0,
    publish: Annotated[
        bool, shipped_option("--publish", help="Write figures/audit.csv, which the lessons show.")
    ] = False,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    device: Device = ANY_DEVICE,
    *,
    scheduler: Scheduler,
) -> None:
    """Put a classifier of your own on trial and write a report; or all shipped models (hours)."""
    from advlab.upkeep import report, trial

    places: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "device": str(device)}
    names = targets or []
    if not any(map(is_target, names)):
        shipped = partial(trial.run, names, publish=publish, scheduler=scheduler, console=console)
        shipped(**places, auto_n=auto_n, best_n=best_n, test_n=test_n)
        return
    if len(names) > 1:
        raise ValueError(f"{len(names)} targets; a report is of one: give each its own command")
    settings = report.Settings(parse_eps(eps), n, seed, autoattack, claim)
    kind = None if arch is None else str(arch)
    own = partial(report.run, weights=weights, arch=kind, source=source, output_dir=output_dir)
    own(names[0], settings, **places, scheduler=scheduler, console=console)


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

    for path in classroom.build(
        files.results_folder(output or files.home() / "outputs" / "course")
    ):
        _say(f"Written: {path}")


@course.command()
def check(
    notebooks: Annotated[list[Path], typer.Argument(help="Yours, such as a2.ipynb; as saved.")],
) -> None:
    """For students: say what would cost points, and which tests pass; exit code 1 if any would."""
    from advlab.classroom import selfcheck

    ready = True
    for path in notebooks:
        with errors.status("running the notebook from top to bottom"):
            report = selfcheck.check(path)
        _say(f"{report}\n")
        ready = ready and not report.costs
    if not ready:
        raise typer.Exit(1)


@course.command()
@on_cluster
def rehearse(
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/rehearsal.")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write figures/grading.csv, and the guide's table.")
    ] = False,
    *,
    scheduler: Scheduler,
) -> None:
    """Grade the assignments' own solutions: they must get all points. Says how long it takes."""
    from advlab.classroom import course as classroom

    kept = files.results_folder(output or files.home() / "outputs" / "rehearsal")
    on: dict[str, Any] = {"scheduler": scheduler, "console": console}
    table = classroom.rehearse(kept, publish=publish, **on)
    console.print(table.to_string(index=False), markup=False, highlight=False)


@course.command()
@on_cluster
def grade(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Holds STUDENT/a2/a2.ipynb, STUDENT_a2.ipynb, or what Canvas, Moodle or GitHub "
            "Classroom let you download."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/grades.")] = None,
    sandbox: Annotated[bool, typer.Option(help="Run the notebooks under bubblewrap.")] = True,
    jobs: Annotated[int | None, typer.Option(min=1, help="Own workers; else one a core.")] = None,
    marks: Annotated[
        list[Path] | None,
        typer.Option(help="CSV: student, assignment, cell, score given by hand, comment."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Let the tests draw again as in grades.csv.")
    ] = None,
    due: Annotated[
        Path | None, typer.Option(help="TOML: when assignments are due, and what late work loses.")
    ] = None,
    keep: Annotated[Kept, typer.Option(help="Of what a student handed in more than once.")] = LAST,
    gradebook: Annotated[
        list[Path] | None,
        typer.Option(help="CSV exported from Canvas or Moodle, to be filled in; repeatable."),
    ] = None,
    *,
    scheduler: Scheduler,
) -> None:
    """Grade a folder of submissions: tables of grades, and a page of feedback for each student."""
    from advlab.classroom import course as classroom

    kept = files.results_folder(output or files.home() / "outputs" / "grades")
    mark = partial(classroom.grade, sandbox=sandbox, jobs=jobs, marks=marks or (), seed=seed)
    asked: dict[str, Any] = {"due": due, "exported": gradebook or (), "keep": str(keep)}
    table = mark(folder, kept, **asked, scheduler=scheduler, console=console)
    totals = table.groupby(["student", "assignment"])[["score", "points"]].sum()
    console.print(totals.to_string(), markup=False, highlight=False)


@app.command()
def site(
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/site.")] = None,
) -> None:
    """Build a site of the lessons as they ran, to be read without Python; nothing is executed."""
    from advlab.upkeep import site as pages

    first = pages.build(files.results_folder(output or files.home() / "outputs" / "site"))
    _say(f"Open in a browser: {first}")


@app.command()
def slides(
    lessons: Annotated[
        list[str] | None, typer.Argument(help="Such as 02_fgsm, 02, fgsm; all lessons for none.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/slides.")] = None,
) -> None:
    """Make slides of lessons as they ran: a file each, which needs no network."""
    from advlab.upkeep import slides as decks

    folder = files.results_folder(output or files.home() / "outputs" / "slides")
    for path in decks.write(folder, lessons or ()):
        _say(f"Written: {path}")


@app.command()
def questions(
    output: Annotated[Path | None, typer.Option(help="Folder; else outputs/questions.")] = None,
) -> None:
    """Write all questions and exercises, with answers, for Anki (CSV) and Moodle (XML)."""
    from advlab.upkeep import questions as bank

    for path in bank.write(files.results_folder(output or files.home() / "outputs" / "questions")):
        _say(f"Written: {path}")


@app.command()
def doctor() -> None:
    """Check Python, packages, data, checkpoints and machine; exit code 1 if anything fails."""
    checks = checkup.run_checks()
    _say(checkup.report(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    targets: Annotated[list[str], typer.Argument(help=f"{TARGET_HELP}; one or more.")],
    weights: OwnWeights = None,
    arch: Arch = None,
    source: Annotated[
        str | None,
        typer.Option(help="A TARGET whose gradient makes the attacked images; else each its own."),
    ] = None,
    attack: Annotated[
        AttackName, typer.Option(help="; ".join(f"{a.name}: {a.about}" for a in ATTACKS.values()))
    ] = FGSM,
    dataset: Dataset = "auto",
    data_dir: DataDir = "auto",
    device: Device = ANY_DEVICE,
    test_n: Annotated[int | None, typer.Option(min=1, help="Test images; all for none.")] = None,
) -> None:
    """Print the accuracy of any classifier, clean and attacked."""
    images = open_data(dataset, data_dir, str(device), test_n)
    kind = None if arch is None else str(arch)
    opened = [open_target(text, images, weights, kind) for text in targets]
    maker = open_target(source, images, arch=kind) if source else None
    measure = partial(evaluation.accuracy_table, attack=str(attack), progress="evaluating")
    table = measure(opened, images, paper.TEST_EPS, source=maker)
    made_by = f"transfer from {maker.name}" if maker else "white box"
    _say(f"accuracy % on {len(images.test):,} {images.name} test images; {attack}, {made_by}")
    wide = 100 * table.pivot(index="model", columns="test_eps", values="accuracy")
    _say(wide.to_string(float_format="%.1f"))
    for row in table[table["test_eps"] == 0].itertuples():
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        _say(f"{row.model}: clean {row.correct}/{row.n}, 95 % interval {interval}")
