"""What this machine has to compute with, and how a long computation shows where it is."""

import os
import sys

import torch
from tqdm import tqdm

from advlab import files

DEVICES = ("auto", "cpu", "cuda", "mps")


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on; "auto" takes ADVLAB_DEVICE, or cuda, then mps, then the CPU.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    device = files.setting(device, "ADVLAB_DEVICE", "auto")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}  # how many there are
    there["mps"] = int(torch.backends.mps.is_available())
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    kind, _, number = device.partition(":")
    if not (number or "0").isdecimal() or int(number or 0) >= there.get(kind, 0):
        found = ", ".join(name for name, count in there.items() if count)
        raise ValueError(f"device {device!r} is not on this machine; choose auto, or {found}")
    return torch.device(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed in hardware (elsewhere it would be slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not `torch.cpu.get_capabilities`, which torch 2.9 does not have.
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and in_hardware


def progress_bar(label: str | None, total: int, unit: str) -> tqdm:
    """Return a progress bar; none is shown for `label` None.

    It is text on standard output, in notebooks too: a bar made of widgets would leave state behind
    that some viewers refuse, and standard error would look like a warning.
    """
    return tqdm(
        total=total,
        desc=label,
        disable=label is None,
        unit=unit,
        unit_scale=total >= 100_000,
        file=sys.stdout,
        leave=False,
        mininterval=1.0,
        ncols=100,
    )
