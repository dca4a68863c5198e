"""The command `advlab`, called as a user calls it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from advlab import __main__, cli, evaluation, files, models, recipes
from advlab.bench import run as bench
from advlab.catalogue import ATTACKS
from advlab.checkpoints import save, weights_hash
from advlab.upkeep import doctor, publish, runs, trial
from advlab.upkeep.cluster import Scheduler
from advlab.upkeep.tasks import Options

runner = CliRunner()
HOME = str(files.home())
ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both


@pytest.fixture
def weights(tmp_path, trained):
    """A published-style state dict of the CNN."""
    path = tmp_path / "published.pth"
    torch.save(trained[0].model.state_dict(), path)
    return path


def test_evaluate_prints_the_table_of_files_white_box_or_by_transfer(weights, trained):
    on, other = ["--arch", "cnn", "--dataset", "shapes10", "--test-n"], str(trained[1].path)
    result = runner.invoke(cli.app, ["evaluate", str(weights), other, *on, "130"])
    assert result.exit_code == 0, result.output
    assert "130 Shapes-10 test images; fgsm, white box" in result.output
    correct = trained[0].metadata["correct"]
    assert f"published: clean {correct}/130" in result.output
    assert trained[1].path.stem in result.output
    more = ["--attack", "fgsm-per-image", "--source", other]
    result = runner.invoke(cli.app, ["evaluate", str(weights), *on, "20", *more])
    assert result.exit_code == 0, result.output
    assert f"transfer from {trained[1].path.stem}" in result.output


def test_choices_are_what_the_package_declares():
    choices = [
        ("run", "--profile", recipes.PROFILES),
        ("evaluate", "--arch", models.ARCHITECTURES),
        ("evaluate", "--attack", ATTACKS),
        ("audit", "--device", ("auto", "cpu", "cuda", "mps")),
    ]
    for command, option, names in choices:
        result = runner.invoke(cli.app, [command, option, "none-of-them"])
        assert result.exit_code == 2
        said = " ".join(result.output.replace("│", " ").split())
        assert f"Invalid value for '{option}'" in said
        assert all(f"'{name}'" in said for name in ("none-of-them", *names))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "missing.pth", "--arch", "cnn"], "no weights file missing.pth"),
        (["evaluate", "WEIGHTS", "--arch", "cnn-lstm"], "does not fit this architecture"),
        (["evaluate", "WEIGHTS", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["evaluate", "WEIGHTS", "--arch", "cnn", "--device", ABSENT], f"device '{ABSENT}' is not"),
        (["run", "99_none"], "unknown lesson '99_none'"),
        (["run", "--param", "nonsense=1"], "unknown parameter 'nonsense'"),
        (["run", "--param", "nonsense"], "not of the form name=value"),
        (["run", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["run", "--data-dir", "/no/such/folder"], "in /no/such/folder"),
        (["run", "01", "--dataset", "shapes10", "--output-dir", HOME], "repository's own files"),
        (["bench", "--dataset", "shapes10", "--output-dir", f"{HOME}/figures"], "own files"),
        (["course", "build", "--output", f"{HOME}/notebooks"], "own files"),
        (["course", "grade", ".", "--output", HOME], "own files"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(weights, arguments, message):
    arguments = [str(weights) if a == "WEIGHTS" else a for a in arguments]
    if arguments[0] == "evaluate" and "--dataset" not in arguments:
        arguments += ["--dataset", "shapes10", "--test-n", "5"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_evaluate_reads_what_a_file_says_of_itself(tmp_path):
    model, told = models.build("cnn-lstm-positions", 0), {"train_eps": 0.0, "seed": 0}
    path = tmp_path / "positions.safetensors"
    own = {"arch": "cnn-lstm-positions", "weights_hash": weights_hash(model), "classes": list("ab")}
    save(model, told | own, path)
    command = ["evaluate", str(path), "--dataset", "shapes10", "--test-n", "40"]
    result = runner.invoke(cli.app, [*command, "--arch", "cnn-lstm"])
    assert result.exit_code == 1
    told = "is of the architecture cnn-lstm-positions, not cnn-lstm; leave --arch out"
    assert told in " ".join(result.output.split())


def test_two_files_of_one_name_are_refused_before_anything_is_computed(weights, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)
    other = weights.parent / "ben" / weights.name
    other.parent.mkdir()
    other.write_bytes(weights.read_bytes())
    on = ["--arch", "cnn", "--dataset", "shapes10", "--test-n", "9"]
    result = runner.invoke(cli.app, ["evaluate", str(weights), str(other), *on])
    assert result.exit_code == 1
    assert "two targets are called published, and a table could not" in result.output


def test_parameters_are_parsed_as_yaml():
    parsed = cli.parse_parameters(["a=1", "b=0.5", "c=true", "d=text", "e=[1, 2]", "f=", "g=1e-3"])
    assert parsed == {
        **{"a": 1, "b": 0.5, "c": True, "d": "text", "e": [1, 2], "f": None},
        "g": pytest.approx(1e-3),
    }
    assert cli.parse_parameters(["a='%TEMP%'", 'b="a: b"']) == {"a": "%TEMP%", "b": "a: b"}


@pytest.mark.parametrize(
    "value", ["%TEMP%/data", "[1,2", "@x", "a: b", "{a: 1}", "[[1]]", "2026-01-01"]
)
def test_parameter_that_yaml_reads_as_no_plain_value_is_refused(value):
    told = (
        rf"^--param {re.escape(repr('x=' + value))}: the value is no number, [^\n]* quotes [^\n]*$"
    )
    with pytest.raises(ValueError, match=told):
        cli.parse_parameters([f"x={value}"])


def test_evaluate_heeds_the_variable_of_the_data_set(weights, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATASET", "shapes10")
    result = runner.invoke(cli.app, ["evaluate", str(weights), "--arch", "cnn", "--test-n", "20"])
    assert "20 Shapes-10 test images" in result.output
    renamed = weights.rename(weights.with_name("published"))  # a file without an ending
    result = runner.invoke(cli.app, ["evaluate", str(renamed), "--arch", "cnn", "--test-n", "20"])
    assert "published: clean" in result.output


def test_ascii_terminal_shows_any_name():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "advlab", "evaluate", "x.pth", "--data-dir", "/no/数据"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert r"in /no/\u6570\u636e, which is no folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_prints_marks_and_its_exit_code_tells(monkeypatch, ok, code):
    checks = [doctor.Check(True, "Python", "3"), doctor.Check(ok, "data", "as it is")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert "[OK]   Python" in result.output
    assert ("[FAIL] data" in result.output) is not ok


def test_options_are_passed_on_as_plain_text(monkeypatch):
    asked = []
    started = (runs, "run"), (publish, "reproduce"), (trial, "run"), (bench, "run")
    for module, name in started:
        monkeypatch.setattr(module, name, lambda *given, **more: asked.append((given, more)))
    places = ["--dataset", "shapes10", "--data-dir", "here"]
    run = ["run", "02", *places, "--profile", "quick", "--seed", "3", "--device", "cpu", "--resume"]
    for command in (
        [*run, "--param", "a=1"],
        ["reproduce", "--seeds", "3", *places, "--resume", "--publish"],
        ["audit", "cnn", *places, "--device", "cpu", "--auto-n", "0", "--test-n", "9"],
        ["bench", *places, "--output-dir", "there", "--rounds", "2", "--only", "start, memory"],
    ):
        where = ["--scheduler", "tls://a:1", "--tls-ca", "b"] if command[0] != "bench" else []
        result = runner.invoke(cli.app, [*command, *where])
        assert result.exit_code == 0, result.output
    shared = {"dataset": "shapes10", "data_dir": "here"}
    options = Options("quick", "shapes10", "here", "auto", 3, "cpu")
    numbers = {"device": "cpu", "auto_n": 0, "best_n": 0, "test_n": 9}
    numbers["publish"] = False
    on = {"console": cli.console, "scheduler": Scheduler("tls://a:1", tls_ca="b")}
    assert asked == [
        ((["02"], options), {"parameters": {"a": 1}, "resume": True} | on),
        ((3,), shared | {"resume": True, "publish": True} | on),
        ((["cnn"],), shared | numbers | on),
        (("shapes10", "here", "there", 2, False, ["start", "memory"], cli.console), {}),
    ]
    # Worker processes get them: they must not need this module to read them.
    assert {type(value) for value in vars(asked[0][0][1]).values()} == {str, int}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reproduce", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["reproduce", "--dataset", "shapes10", "--publish"], "--publish: there is no CIFAR-10"),
        (["reproduce", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["bench", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["bench", "--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["bench", "--dataset", "shapes10", "--publish"], "--publish: there is no CIFAR-10"),
    ],
)
def test_reproduce_and_bench_refuse_with_the_reason(empty_home, command, message):
    result = runner.invoke(cli.app, command)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_command_whose_torch_is_broken_prints_the_doctor_s_report(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open')")
    environment = {**os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "advlab", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "advlab cannot start: OSError('libtorch_cpu.so: cannot open')" in done.stderr
    assert "Traceback" not in done.stderr
    assert "[OK]   Python" in done.stdout
    assert "[FAIL] torchvision import libtorch_cpu.so: cannot open" in done.stdout


def test_main_runs_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["advlab", "--help"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0


def break_off(*args, **options):
    raise KeyboardInterrupt


def break_into_a_lock(*args, **options):
    with Lock():
        raise KeyboardInterrupt


class Lock:
    """A lock that an interruption met before it was held."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        raise RuntimeError("cannot release un-acquired lock")


@pytest.mark.parametrize("how", [break_off, break_into_a_lock])
def test_command_that_is_stopped_says_so_whatever_it_broke_into(how, monkeypatch):
    monkeypatch.setattr(doctor, "run_checks", how)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 130
    assert "advlab: stopped. What is finished is kept" in result.output
