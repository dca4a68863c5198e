"""Training in processes, and what is asked of a run."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from advlab import datasets, lab
from advlab.recipes import Recipe
from advlab.store import Zoo
from advlab.upkeep import train
from advlab.upkeep.train import Options, train_models


def open_tiny_zoo(folder: Path) -> Zoo:
    """Open a zoo of tiny models; at module level, so that worker processes can call it."""
    recipe = Recipe("tiny", epochs=1, batch_size=32)
    return Zoo(datasets.Shapes10(64, 32), recipe, 0, folder, progress=False)


def test_what_is_missing_is_trained_in_processes(tmp_path, capfd):
    make_zoo = partial(open_tiny_zoo, tmp_path)
    make_zoo().get("cnn-lstm")
    before = (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns
    wanted = [("cnn-lstm", 0.0), ("cnn", 0.0), ("cnn", 0.2)]
    assert train_models(make_zoo, wanted, jobs=2) == 2
    assert make_zoo().find("cnn", 0.2)
    assert (tmp_path / "cnn-lstm-baseline-seed0.safetensors").stat().st_mtime_ns == before
    printed = capfd.readouterr().out
    assert "2/2 models" in printed
    assert re.search(r"cnn-baseline-seed0 +accuracy 0\.\d{4}, [\d,]+ images/s", printed)
    assert train_models(make_zoo, wanted) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), ("cuda", 1)])
def test_a_process_per_core_but_one_on_a_gpu(tmp_path, monkeypatch, device, processes):
    asked = []

    def threads(jobs, context, start, setup):  # in place of processes, which take seconds to start
        asked.append(jobs)
        return ThreadPoolExecutor(1, initializer=start, initargs=setup)

    monkeypatch.setattr(train, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(train, "cores", lambda: 2)
    monkeypatch.setattr(train, "_device", lambda zoo: train.torch.device(device))
    make_zoo = partial(open_tiny_zoo, tmp_path)
    # The second waits for a baseline that nobody asked for.
    assert train_models(make_zoo, [("cnn-lstm", 0.0), ("cnn", 0.1)]) == 2
    assert make_zoo().find("cnn", 0.1)
    assert asked == [processes]


def test_workers_import_neither_plotting_nor_papermill():
    code = "import sys, advlab.upkeep.train; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"matplotlib", "papermill", "seaborn"} & set(loaded.stdout.split())


def test_options_are_decided_once(empty_home, monkeypatch, fake_cifar10):
    monkeypatch.delenv("ADVLAB_OUTPUT")
    monkeypatch.setenv("ADVLAB_DEVICE", "cpu")
    found = Options(data_dir=str(fake_cifar10)).resolved()
    output = str(lab.default_output("lesson", "cifar10"))
    assert found == Options("lesson", "cifar10", str(fake_cifar10), output, 0, "cpu")
    assert found.resolved() == found
    assert found.variables()["ADVLAB_DATA"] == str(fake_cifar10)
    assert "ADVLAB_DATA" not in Options("quick", "shapes10").resolved().variables()
