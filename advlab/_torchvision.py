"""torchvision, imported so that it also works beside a CPU-only torch.

The torchvision wheel on PyPI is linked against CUDA. Beside the CPU-only torch its compiled
operators do not load, which torchvision forgives, but its import then stops at shape rules for
operators that do not exist (``operator torchvision::nms does not exist``). We use data sets and
transforms, never those operators, so declaring their names is enough.
"""

import importlib
import re

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def load() -> None:
    """Import torchvision, declaring the operators that its import asks for and cannot find."""
    while True:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing.group(1), _SCHEMA)


load()

from torchvision import datasets, tv_tensors  # noqa: E402
from torchvision.datasets.utils import check_integrity  # noqa: E402
from torchvision.transforms import ToTensor, v2  # noqa: E402

__all__ = ["ToTensor", "check_integrity", "datasets", "tv_tensors", "v2"]
