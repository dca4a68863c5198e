"""The doctor: what is right, what is not, and the mend."""

import pytest
from packaging.requirements import Requirement

from advlab import checkpoints, data, files, models
from advlab.tools import doctor
from advlab.tools.doctor import check_package, run_checks


def line(name):
    (found,) = [check for check in run_checks() if check.name == name]
    return found


def test_this_environment_is_in_order():
    checks = run_checks()
    names = [check.name for check in checks]
    assert {"Python", "torch", "torchvision", "safetensors", "CIFAR-10", "free memory"} <= set(
        names
    )
    assert len(names) == len(set(names))
    # The trained models may not be there yet; memory is the machine's affair.
    wrong = [check for check in checks if not check.ok]
    assert {check.name for check in wrong} <= {"checkpoints", "free memory"}
    assert all(check.detail for check in checks)


def test_optional_packages_are_not_asked_for():
    names = {check.name for check in run_checks()}
    assert not names & {"pytest", "foolbox", "torchattacks", "adversarial-robustness-toolbox"}


def test_missing_package_fails_with_the_mend():
    check = check_package(Requirement("no-such-package>=1"))
    assert check == (False, "no-such-package", "not installed; run: pip install -e .")


def test_too_old_package_fails_with_the_mend():
    check = check_package(Requirement("torch>=99"))
    assert not check.ok
    assert check.detail.endswith(", but >=99 is needed; run: pip install -e .")


def test_local_version_of_torch_fits():
    assert check_package(Requirement("torch>=2")).ok


def test_missing_data_are_no_fault(empty_home):
    check = line("CIFAR-10")
    assert check.ok
    assert "Shapes-10 stands in" in check.detail


def test_intact_data_are_named(fake_cifar10, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    check = line("CIFAR-10")
    assert check.ok
    assert str(fake_cifar10) in check.detail
    assert "every MD5 right" in check.detail


def test_damaged_data_file_fails_by_name(fake_cifar10, monkeypatch):
    monkeypatch.setenv("ADVLAB_DATA", str(fake_cifar10))
    path = fake_cifar10 / data.CIFAR10_FOLDER / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    check = line("CIFAR-10")
    assert not check.ok
    assert f"{path} is truncated or altered" in check.detail


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
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: 1.23)
    assert line("free memory") == (False, "free memory", "1.2 GB (>= 3 GB)")
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: None)
    assert line("free memory").ok


def test_free_memory_is_below_all_memory():
    psutil = pytest.importorskip("psutil", reason="psutil comes with JupyterLab")
    free = doctor.free_memory_gb()
    assert free is None or 0 < free <= psutil.virtual_memory().total / 1e9


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 9))
    assert not line("Python").ok


def test_check_that_raises_has_failed(monkeypatch):
    def broken():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_bf16", broken)
    assert line("device") == (False, "device", "first line")
