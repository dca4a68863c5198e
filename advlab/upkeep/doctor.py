"""Check the environment: what works, what does not, and the mend. Bug reports quote its output.

Torch and what stands on it are imported by the checks alone: they tell when that fails.
"""

import importlib
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
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


def check_package(requirement: Requirement) -> Check:
    """Check that a package is installed in a version that fits `requirement`."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(False, requirement.name, "not installed; run: pip install -e .")
    fits = requirement.specifier.contains(found, prereleases=True)
    mend = "" if fits else f", but {requirement.specifier} is needed; run: pip install -e ."
    return Check(fits, requirement.name, found + mend)


def _torchvision() -> tuple[bool, str]:
    importlib.import_module("advlab._torchvision")
    import torch
    import torchvision
    from torchvision.extension import _has_ops

    if _has_ops():
        return True, "works beside this torch"
    pair = f"torch {torch.__version__} beside torchvision {torchvision.__version__}"
    if torch.version.cuda is None:
        pair += " (CPU-only torch beside PyPI's torchvision, which is linked against CUDA)"
    return True, f"{pair}. {WITHOUT_OPERATORS}"


def _settings() -> tuple[bool, str]:
    from advlab import files, lab

    own = {name: value for name, value in os.environ.items() if name.startswith("ADVLAB_")}
    if unknown := ", ".join(sorted(own.keys() - files.SETTINGS)):
        return False, f"there is no {unknown}; the variables are {', '.join(files.SETTINGS)}"
    lab.output_folder("auto", lab.profile_name(), "auto")
    return True, ", ".join(f"{name}={value}" for name, value in sorted(own.items())) or "none set"


def _kernel() -> tuple[bool, str]:
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    command = [spec.argv[0], "-c", "import sys; print(sys.prefix)"]
    own = spec.argv[0] in ("python", "python3")  # jupyter takes its own Python for these
    prefix = sys.prefix if own else subprocess.check_output(command, text=True).strip()
    if prefix == sys.prefix:
        return True, f"python3 starts {sys.executable}"
    return False, (
        f"python3 starts {spec.argv[0]}, not {sys.executable}: lessons opened in JupyterLab run "
        f"there (advlab run does not mind). Remove {spec.resource_dir}"
    )


def _data() -> tuple[bool, str]:
    from advlab import datasets

    name = datasets.asked()
    key = "cifar10" if name == "auto" else name
    source = datasets.DATASETS.get(key)
    if source is None:
        return True, key
    root = datasets.find(key)
    if root is None:
        told = ", or Shapes-10 stands in" if name == "auto" else ""
        return True, f"{source.name} is not here; it is downloaded{told}"
    source.check(root)
    return True, f"{' and '.join(str(root / top) for top in source.tops)}, every MD5 right"


def _checkpoints() -> tuple[bool, str]:
    from advlab import checkpoints, files

    paths = sorted(files.shipped_checkpoints().glob("*.safetensors"))
    for path in paths:
        checkpoints.load(path)
    if not paths:
        mend = "git checkout, or install the whole wheel"
        return False, f"none in {files.shipped_checkpoints()}; {mend}"
    return True, f"{len(paths)} trained models, all intact"


def _device() -> tuple[bool, str]:
    from advlab import machine

    device = machine.pick_device()
    precision = "bfloat16" if machine.has_fast_bf16(device) else "float32 (no bf16)"
    return True, f"{device.type}, trains in {precision}"


def _cores() -> tuple[bool, str]:
    from advlab import machine

    found = f"{machine.cores()} of {os.cpu_count()}, {platform.machine()}"
    if math.isfinite(machine.quota()):
        found += f", quota {machine.quota():.3g}"
    return True, (
        f"{found}; others keep {machine.busy_cores():.1f} busy. Attacks and tables use "
        f"{machine.threads()} thread(s), a training that starts now {machine.free_threads()}; "
        "ADVLAB_THREADS sets both"
    )


def free_memory_gb() -> float:
    """Return the memory that is free for a new program, in GB."""
    import psutil

    return psutil.virtual_memory().available / 1e9


def _memory() -> tuple[bool, str]:
    free = free_memory_gb()
    return free >= MINIMUM_MEMORY_GB, f"{free:.1f} GB (>= {MINIMUM_MEMORY_GB} GB)"


def run_checks() -> list[Check]:
    """Return every check of Python, packages, data, checkpoints, processor and memory.

    One that raises has failed, and its message is the detail.
    """
    python = f"{platform.python_version()} (>= 3.11)"
    checks = [Check(sys.version_info >= (3, 11), "Python", python)]
    for requirement in map(Requirement, requires("advlab") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            checks.append(check_package(requirement))
    for name, check in {
        "torchvision import": _torchvision,
        "settings": _settings,
        "data": _data,
        "kernel": _kernel,
        "checkpoints": _checkpoints,
        "device": _device,
        "cores": _cores,
        "free memory": _memory,
    }.items():
        try:
            ok, detail = check()
        except Exception as error:
            ok, detail = False, str(error).splitlines()[0] if str(error) else repr(error)
        checks.append(Check(ok, name, detail))
    return checks


def report(checks: Iterable[Check]) -> str:
    """Return the checks as text, a line each."""
    marks = {True: "[OK]  ", False: "[FAIL]"}
    return "\n".join(f"{marks[check.ok]} {check.name:<18} {check.detail}" for check in checks)
