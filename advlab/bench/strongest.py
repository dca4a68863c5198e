"""AutoAttack beside its authors' package as it is: the same verdicts, and images an hour."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from advlab.autoattack import Each, auto_attack
from advlab.bench.measure import Row, once
from advlab.data import ImageData
from advlab.forward import CHUNK, eval_mode
from advlab.machine import cores

EPS = 8 / 255
PACKAGE = "pyautoattack"


def strongest_part(
    images: ImageData,
    robust: nn.Module,
    papers: Mapping[str, nn.Module],
    n: int = 200,
    few: int = 50,
) -> list[Row]:
    """Measure AutoAttack on a robust model, whose images hold, and on models whose images do not.

    Args:
        images: Data; the first test images are attacked.
        robust: Its parts are computed side by side, a process for each core, whose start counts.
        papers: The paper's ten models, by name; one after the other, in this process.
        n, few: Images of the robust model, and of each of the others.

    Returns:
        Rows; none without the package.

    Raises:
        RuntimeError: if the verdicts are not the same.
    """
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        return []
    processes = ProcessPoolExecutor(
        cores(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with processes as pool:
        rows = _both("robust CNN", {"robust CNN": robust}, images, n, 1.3, pool.map)
    return rows + _both(f"the paper's {len(papers)} models", papers, images, few, 5.0, map)


def _both(
    what: str,
    networks: Mapping[str, nn.Module],
    images: ImageData,
    n: int,
    target: float,
    each: Each,
) -> list[Row]:
    """Attack the first `n` images of each model both ways, in turn; return a row for each way."""
    batch = images.test.first(n).batch(slice(None))
    ways: dict[str, Callable[..., Tensor]]
    ways = {PACKAGE: _by_package, "advlab": partial(auto_attack, eps=EPS, each=each)}
    seconds, holding = dict.fromkeys(ways, 0.0), 0
    for name, model in networks.items():
        held = {}
        for way, attack in ways.items():
            start = time.perf_counter()
            held[way] = attack(model, *batch)
            seconds[way] += time.perf_counter() - start
        other = int((held["advlab"] != held[PACKAGE]).sum())
        # Rounding, in another memory layout, decides of an image at the edge.
        if other > len(batch[1]) // 50:
            raise RuntimeError(
                f"{name}: AutoAttack has other verdicts on {other} images; not timed"
            )
        holding += int(held["advlab"].sum())
    total = len(networks) * len(batch[1])
    rate = {way: 3_600 * total / spent for way, spent in seconds.items()}
    row = partial(once, "AutoAttack", f"{what}, {len(batch[1])} images", unit="images/h")
    note = f"{holding} of {total} images hold"
    ratio = rate["advlab"] / rate[PACKAGE]
    return [
        row(PACKAGE, rate[PACKAGE]),
        row("advlab", rate["advlab"], against=PACKAGE, ratio=ratio, target=target, note=note),
    ]


def _by_package(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images hold by the package's own `run_standard_evaluation`.

    It is given as many at a time as `auto_attack` gives it: other batches have other random starts.
    """
    from pyautoattack import AutoAttack

    with eval_mode(model):
        attacker = AutoAttack(model, eps=EPS, seed=0)
        evaluate = partial(attacker.run_standard_evaluation, batch_size=CHUNK)
        parts = zip(images.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([evaluate(x, y)[1] == y for x, y in parts])
