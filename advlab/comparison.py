"""Whether two networks differ, by the same images: a paired test, and a correction for many.

An interval of each accuracy is too careful where both networks saw the same images: most are easy
for both, or hard for both, and only the others tell the two apart.
"""

import math
from collections.abc import Sequence

from torch import Tensor


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Compare two networks on the same images (McNemar 1947; exact).

    Args:
        first, second: (N,) bool, which images each gets right, in one order.

    Returns:
        How many images only the first gets right, how many only the second, and the two-sided p:
        how probable a split so uneven, or more so, is if each of these images fell to either
        network with probability 1/2.

    Raises:
        ValueError: if the two are not equally long.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"{len(first)} images and {len(second)}; a paired test needs the same ones for both"
        )
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = math.fsum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(fewer + 1))
    return only_first, only_second, min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for how many there are (Holm 1979), in their order.

    Whoever looks at twenty comparisons finds one below 0.05 by chance. Of those whose corrected
    value is below 0.05, with probability 95 % none is there by chance.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected
