"""The command `advlab`, called as a user calls it."""

import inspect
import json

import pytest
import torch
from typer.testing import CliRunner

from advlab import models
from advlab.tools import cli, doctor

runner = CliRunner()


@pytest.fixture
def weights(tmp_path, trained):
    """A published-style state dict of the CNN."""
    path = tmp_path / "published.pth"
    torch.save(trained[0].model.state_dict(), path)
    return path


def test_evaluate_prints_the_table_of_a_pth_and_a_safetensors_file(weights, trained):
    command = ["evaluate", str(weights), str(trained[1].path), "--arch", "cnn"]
    result = runner.invoke(cli.app, [*command, "--dataset", "shapes10", "--test-n", "130"])
    assert result.exit_code == 0, result.output
    assert "130 Shapes-10 test images; fgsm, white box" in result.output
    correct = trained[0].metadata["correct"]
    assert f"published: clean {correct}/130" in result.output
    assert trained[1].path.stem in result.output


def test_evaluate_takes_a_source(weights, trained):
    command = ["evaluate", str(weights), "--arch", "cnn", "--source", str(trained[1].path)]
    command += ["--attack", "fgsm-per-image", "--dataset", "shapes10", "--test-n", "20"]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert f"transfer from {trained[1].path.name}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth", "--arch", "cnn"], "no weights file missing.pth"),
        (["WEIGHTS", "--arch", "resnet"], "unknown architecture 'resnet'"),
        (["WEIGHTS", "--arch", "cnn-lstm"], "does not fit this architecture"),
        (["WEIGHTS", "--arch", "cnn", "--attack", "magic"], "unknown attack 'magic'"),
        (["WEIGHTS", "--arch", "cnn", "--dataset", "mnist"], "unknown data set 'mnist'"),
    ],
)
def test_evaluate_refuses_with_the_reason(weights, arguments, message):
    arguments = [str(weights) if a == "WEIGHTS" else a for a in arguments]
    if "--dataset" not in arguments:
        arguments += ["--dataset", "shapes10", "--test-n", "5"]
    result = runner.invoke(cli.app, ["evaluate", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["99_none"], "unknown lesson '99_none'"),
        (["--param", "nonsense=1"], "unknown parameter 'nonsense'"),
        (["--param", "nonsense"], "not of the form name=value"),
        (["--profile", "slow"], "unknown profile 'slow'"),
        (["--dataset", "mnist"], "unknown data set 'mnist'"),
        (["--data-dir", "/no/such/folder"], "no folder cifar-10-batches-py in /no/such/folder"),
    ],
)
def test_run_refuses_with_the_reason(arguments, message):
    result = runner.invoke(cli.app, ["run", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_parameters_are_parsed_as_yaml():
    parsed = cli.parse_parameters(["a=1", "b=0.5", "c=true", "d=text", "e=[1, 2]"])
    assert parsed == {"a": 1, "b": 0.5, "c": True, "d": "text", "e": [1, 2]}


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_prints_marks_and_its_exit_code_tells(monkeypatch, ok, code):
    checks = [doctor.Check(True, "Python", "3"), doctor.Check(ok, "data", "as it is")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert "[OK]   Python" in result.output
    assert ("[FAIL] data" in result.output) is not ok


def test_retrain_without_cifar10_says_why(monkeypatch, empty_home, no_network):
    from advlab.tools import batch

    monkeypatch.setattr(batch, "lesson_files", dict)
    result = runner.invoke(cli.app, ["retrain"])
    assert result.exit_code == 1
    assert "CIFAR-10 is not here" in " ".join(result.output.split())
    assert not (empty_home / "figures").exists()


def test_reproduce_passes_its_options_on(monkeypatch):
    from advlab.tools import batch

    asked = []
    monkeypatch.setattr(batch, "reproduce", lambda seeds, **more: asked.append((seeds, more)))
    assert runner.invoke(cli.app, ["reproduce"]).exit_code == 0
    command = ["reproduce", "--seeds", "3", "--dataset", "shapes10", "--data-dir", "here"]
    assert runner.invoke(cli.app, [*command, "--resume", "--publish"]).exit_code == 0
    plain = {"dataset": "auto", "data_dir": "auto", "resume": False, "publish": False}
    given = {"dataset": "shapes10", "data_dir": "here", "resume": True, "publish": True}
    assert asked == [(1, plain | {"console": cli.console}), (3, given | {"console": cli.console})]


def test_bench_passes_its_options_on(monkeypatch):
    from advlab.bench import run as bench

    asked = []
    signature = inspect.signature(bench.run)

    def run(*arguments, **more):
        asked.append(signature.bind(*arguments, **more).arguments)

    monkeypatch.setattr(bench, "run", run)
    assert runner.invoke(cli.app, ["bench"]).exit_code == 0
    command = ["bench", "--dataset", "shapes10", "--data-dir", "here", "--output-dir", "there"]
    assert runner.invoke(cli.app, [*command, "--rounds", "2"]).exit_code == 0
    plain = {"dataset": "auto", "data_dir": "auto", "output_dir": "auto", "rounds": 5}
    given = {"dataset": "shapes10", "data_dir": "here", "output_dir": "there", "rounds": 2}
    for found, expected in zip(asked, (plain, given), strict=True):
        assert expected.items() <= found.items()
        assert found["console"] is cli.console


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reproduce", "--seeds", "0"], "Invalid value for '--seeds'"),
        (["reproduce", "--dataset", "shapes10", "--publish"], "--publish: there is no CIFAR-10"),
        (["reproduce", "--dataset", "mnist"], "unknown data set 'mnist'"),
        (["bench", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["bench", "--dataset", "mnist"], "unknown data set 'mnist'"),
        (["bench", "--dataset", "shapes10", "--publish"], "--publish: there is no CIFAR-10"),
    ],
)
def test_reproduce_and_bench_refuse_with_the_reason(empty_home, command, message):
    result = runner.invoke(cli.app, command)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())


def test_every_architecture_has_a_parameter_count():
    counts = {name: models.count_parameters(models.build(name)) for name in models.ARCHITECTURES}
    assert json.dumps(counts) == (
        '{"cnn": 308256, "cnn-lstm": 293994, "cnn-lstm-positions": 293994}'
    )
