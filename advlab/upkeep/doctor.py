"""Check the environment: what works, what does not, and the mend. Bug reports quote its output.

Torch and what stands on it are imported by the checks alone: they tell when that fails.
"""

import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

MINIMUM_MEMORY_GB = 3
WITHOUT_OPERATORS = (
    "Data sets, transforms and models work, and so does all of advlab. Compiled operators "
    "(torchvision.ops.nms, roi_pool, deform_conv2d, and with them the detection models; roi_align "
    "is slow) do not, nor the decoders and encoders of torchvision.io (read_image, decode_jpeg, "
    "v2.JPEG). The mend, if you need those: pip install --force-reinstall --no-deps torchvision "
    "--index-url https://download.pytorch.org/whl/cpu"
)


class Check(NamedTuple):
    """One line of the report."""

    ok: bool
    name: str
    detail: str


def _python() -> Check:
    return Check(sys.version_info >= (3, 11), "Python", f"{platform.python_version()} (>= 3.11)")


def check_package(requirement: Requirement) -> Check:
    """Check that a package is installed in a version that fits `requirement`."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(False, requirement.name, "not installed; run: pip install -e .")
    fits = requirement.specifier.contains(found, prereleases=True)
    mend = "" if fits else f", but {requirement.specifier} is needed; run: pip install -e ."
    return Check(fits, requirement.name, found + mend)


def _packages() -> Iterator[Check]:
    for text in requires("advlab") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_package(requirement)


def _torchvision() -> Check:
    importlib.import_module("advlab._torchvision")
    import torch
    import torchvision
    from torchvision.extension import _has_ops

    if _has_ops():
        return Check(True, "torchvision import", "works beside this torch")
    pair = f"torch {torch.__version__} beside torchvision {torchvision.__version__}"
    if torch.version.cuda is None:
        pair += " (CPU-only torch beside PyPI's torchvision, which is linked against CUDA)"
    return Check(True, "torchvision import", f"{pair}. {WITHOUT_OPERATORS}")


def _data() -> Check:
    from advlab import data

    root = data.find_cifar10()
    if root is None:
        return Check(True, "CIFAR-10", "not here; it is downloaded, or Shapes-10 stands in")
    data.check_files(root)
    return Check(True, "CIFAR-10", f"{root / data.CIFAR10_FOLDER}, every MD5 right")


def _checkpoints() -> Check:
    from advlab import checkpoints, files

    paths = sorted(files.shipped_checkpoints().glob("*.safetensors"))
    for path in paths:
        checkpoints.load(path)
    if not paths:
        return Check(False, "checkpoints", f"none in {files.shipped_checkpoints()}; git checkout")
    return Check(True, "checkpoints", f"{len(paths)} trained models, all intact")


def _device() -> Check:
    from advlab import training

    device = training.pick_device()
    fast = training.has_fast_bf16(device)
    return Check(
        True, "device", f"{device.type}, trains in {'bfloat16' if fast else 'float32 (no bf16)'}"
    )


def free_memory_gb() -> float | None:
    """Return the memory that is free for a new program, in GB; None where it cannot be told."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        return int(found.group(1)) / 1e6 if found else None
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return None


def _memory() -> Check:
    free = free_memory_gb()
    if free is None:
        return Check(True, "free memory", "cannot be told on this system")
    return Check(
        free >= MINIMUM_MEMORY_GB, "free memory", f"{free:.1f} GB (>= {MINIMUM_MEMORY_GB} GB)"
    )


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run `check`; a check that raises has failed, and its message is the detail."""
    try:
        return check()
    except Exception as error:
        return Check(False, name, str(error).splitlines()[0] if str(error) else repr(error))


def run_checks() -> list[Check]:
    """Return every check of Python, packages, data, checkpoints, processor and memory."""
    checks = [_python(), *_packages()]
    checks.append(_guarded("torchvision import", _torchvision))
    checks.append(_guarded("CIFAR-10", _data))
    checks.append(_guarded("checkpoints", _checkpoints))
    checks.append(_guarded("device", _device))
    checks.append(Check(True, "cores", f"{os.cpu_count()}, {platform.machine()}"))
    checks.append(_guarded("free memory", _memory))
    return checks


def report(checks: Iterable[Check]) -> str:
    """Return the checks as text, a line each."""
    marks = {True: "[OK]  ", False: "[FAIL]"}
    return "\n".join(f"{marks[check.ok]} {check.name:<18} {check.detail}" for check in checks)
