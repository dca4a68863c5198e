"""Adds to the wheel what the lessons need beside the package: notebooks, tables, trained models.

Everything else about the package is said in pyproject.toml. `advlab.files.shipped` finds these
files in an installed wheel. An editable install has them in the clone. A student's wheel is built
without this file, because the answers of the assignments are among them.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKED = (
    "notebooks/*.ipynb",
    "notebooks/solutions/*.ipynb",
    "notebooks/assignments/README.md",
    "notebooks/assignments/*/*.ipynb",
    "figures/*.csv",
    "figures/*.json",
    "data/checkpoints/*.safetensors",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


class PackRepository(build_py):
    """Copies those files into the package's folder `_repository`."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if self.editable_mode:
            return
        packed = Path(self.build_lib, "advlab", "_repository")
        shutil.rmtree(packed, ignore_errors=True)  # of an earlier build
        for pattern in PACKED:
            found = sorted(HERE.glob(pattern))
            if not found:
                raise FileNotFoundError(f"{HERE} holds no {pattern}; build the wheel in a clone")
            for path in found:
                target = packed / path.relative_to(HERE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": PackRepository})
