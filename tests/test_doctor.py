"""The doctor: what is right, what is not, and the mend."""

import json
import sys

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from advlab import _torchvision, checkpoints, datasets, files, machine, models
from advlab.upkeep import doctor
from advlab.upkeep.doctor import check_package, run_checks

torchvision = sys.modules[_torchvision.datasets.__name__.partition(".")[0]]


def line(name):
    (found,) = [check for check in run_checks() if check.name == name]
    return found


def test_this_environment_is_in_order():
    checks = run_checks()
    names = {check.name for check in checks}
    assert {
        "Python",
        "torch",
        "torchvision",
        "safetensors",
        "data",
        "kernel",
        "free memory",
    } <= names
    assert not names & {"pytest", "foolbox", "torchattacks"}  # what is optional
    assert len(names) == len(checks)
    # Every shipped model loads, by the names of layers that are published; memory is the machine's.
    assert {check.name for check in checks if not check.ok} <= {"free memory"}
    assert all(check.detail for check in checks)


def test_package_that_is_missing_or_too_old_fails_with_the_mend():
    missing = check_package(Requirement("no-such-package>=1"))
    assert missing == (False, "no-such-package", "not installed; run: pip install -e .")
    old = check_package(Requirement("torch>=99"))
    assert not old.ok
    assert old.detail.endswith(", but >=99 is needed; run: pip install -e .")
    assert check_package(Requirement("torch>=2")).ok  # 2.13.0+cpu


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_torchvision_without_its_operators_is_named_with_what_does_not_work(monkeypatch, cuda):
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    check = line("torchvision import")
    assert check.ok  # nothing here needs them
    assert f"torch {torch.__version__} beside torchvision {torchvision.__version__}" in check.detail
    assert ("CPU-only torch beside PyPI's torchvision" in check.detail) is (cuda is None)
    assert "nms" in check.detail
    assert "decode_jpeg" in check.detail
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: True)
    assert line("torchvision import").detail == "works beside this torch"


def test_what_the_doctor_says_of_operators_is_so():
    assert torchvision.transforms.v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape[1] == 4
    if not torchvision.extension._has_ops():
        with pytest.raises(RuntimeError, match="custom C"):
            torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
        with pytest.raises(RuntimeError, match="image extension"):
            torchvision.io.encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_missing_data_are_no_fault_and_damaged_ones_are(empty_home, fake_cifar10, monkeypatch):
    check = line("data")
    assert check.ok
    assert check.detail == "CIFAR-10 is not here; it is downloaded, or Shapes-10 stands in"
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    check = line("data")
    assert check.ok
    assert str(fake_cifar10) in check.detail
    assert "every MD5 right" in check.detail
    path = fake_cifar10 / datasets.CIFAR10_FOLDER / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    check = line("data")
    assert not check.ok
    assert f"{path} is truncated or altered" in check.detail


@pytest.mark.parametrize(
    ("check", "variable", "value", "told"),
    [
        ("data", "DATA", "/no/such/folder", "ADVLAB_DATA: no cifar-10-batches-py in /no/such/fold"),
        ("data", "DATASET", "imagenet", "unknown data set 'imagenet'"),
        ("settings", "PROFILE", "slow", "unknown profile 'slow'"),
        ("settings", "OUTPUT", str(files.home()), "holds the repository's own files"),
        ("settings", "DATADIR", "/x", "there is no ADVLAB_DATADIR; the variables are ADVLAB_CACHE"),
        ("device", "DEVICE", "abacus", "device 'abacus' is not on this machine"),
    ],
)
def test_setting_that_is_wrong_fails(monkeypatch, check, variable, value, told):
    monkeypatch.setenv(f"ADVLAB_{variable}", value)
    assert not line(check).ok
    assert told in line(check).detail


def test_data_set_that_is_chosen_is_the_one_that_is_checked(monkeypatch, no_network, empty_home):
    monkeypatch.setenv("ADVLAB_DATASET", "shapes10")
    assert line("data") == (True, "data", "shapes10")
    monkeypatch.setenv("ADVLAB_DATASET", "mnist")
    assert line("data") == (True, "data", "MNIST is not here; it is downloaded")


def test_cores_are_told_with_quota_load_and_the_threads_that_follow(monkeypatch):
    monkeypatch.setattr(machine, "quota", lambda: 1.5)
    monkeypatch.setattr(machine, "own_cores", lambda: {0, 1, 2})
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.7)
    with machine.torch_threads(4):
        found = line("cores").detail
    assert found.startswith("2 of ")
    assert "quota 1.5; others keep 0.7 busy. Attacks and tables use 2 thread(s)" in found
    assert found.endswith("ADVLAB_THREADS sets both")
    monkeypatch.setenv("ADVLAB_THREADS", "many")
    assert not line("cores").ok


def test_kernel_of_another_python_is_named_with_the_mend(monkeypatch, tmp_path):
    assert line("kernel") == (True, "kernel", f"python3 starts {sys.executable}")
    own, other = tmp_path / "kernels" / "python3", tmp_path / "python"
    other.write_text("#!/bin/sh\necho /another\n")
    other.chmod(0o755)
    own.mkdir(parents=True)
    spec = {"argv": [str(other)], "display_name": "x", "language": "python"}
    (own / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    check = line("kernel")
    assert not check.ok
    assert check.detail.startswith(f"python3 starts {other}, not {sys.executable}: lessons")
    assert check.detail.endswith(f"Remove {own}")


def test_missing_intact_and_damaged_checkpoints(empty_home):
    assert "none in" in line("checkpoints").detail
    assert not line("checkpoints").ok
    model = models.build("cnn")
    path = files.shipped_checkpoints() / "cnn-baseline-seed0.safetensors"
    metadata = {"arch": "cnn", "weights_hash": checkpoints.weights_hash(model)}
    checkpoints.save(model, metadata, path)
    assert line("checkpoints") == (True, "checkpoints", "1 trained models, all intact")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert not line("checkpoints").ok
    assert f"{path} was altered" in line("checkpoints").detail


def test_little_memory_fails(monkeypatch):
    free = doctor.free_memory_gb()
    assert free is None or 0 < free <= psutil.virtual_memory().total / 1e9
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: 1.23)
    assert line("free memory") == (False, "free memory", "1.2 GB (>= 3 GB)")


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 9))
    assert not line("Python").ok


def test_check_that_raises_has_failed(monkeypatch):
    def broken():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_device", broken)
    assert line("device") == (False, "device", "first line")
