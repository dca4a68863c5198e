"""What training in bfloat16 costs: the model of the smallest training eps once more, in float32.

Between 0.5 and 1, bfloat16 tells apart steps of 1/256. An eps of 0.005 is 1.3 of these, so what a
perturbed pixel is rounded to differs from the clean one by 0.004 or by 0.008.
"""

from torch import Tensor

from advlab import models
from advlab.bench.measure import Row
from advlab.catalogue import attack_named
from advlab.comparison import mcnemar
from advlab.data import ImageData
from advlab.evaluation import wilson
from advlab.forward import holds
from advlab.recipes import Recipe
from advlab.store import Zoo
from advlab.training import AugmentedSet, fit

ARCH, TRAIN_EPS, TEST_EPS = "cnn", 0.005, (0.0, 0.02, 0.1)
PAPERS = "fgsm-per-image"


def precision_part(images: ImageData, zoo: Zoo) -> list[Row]:
    """Train in float32 what `zoo` has in bfloat16, from the same seed and directions; compare.

    Args:
        images: Data; all test images are asked about, clean and under the paper's own test (FGSM
            from the baseline).
        zoo: Holds the baseline and the model of that eps.

    Returns:
        A row for each of both and each test eps: accuracy in %, with its 95 % interval. The one of
        float32 says whether McNemar's test tells the two apart.
    """
    baseline, other = zoo.get(ARCH), zoo.get(ARCH, TRAIN_EPS)
    recipe = Recipe(**other.metadata["recipe"])
    model = models.build(ARCH, zoo.seed, images.shape, len(images.classes))
    augmented = AugmentedSet(images.train, zoo.directions(ARCH), TRAIN_EPS)
    name = f"{ARCH} eps={TRAIN_EPS:g}"
    fit(model, augmented, recipe, seed=zoo.seed, precision="float32", progress=name)
    rows, papers = [], attack_named(PAPERS)
    x, y = images.test.batch(slice(None))
    for eps in TEST_EPS:
        shown = papers(baseline.model, x, y, eps)
        right, others = holds(model, shown, y), holds(other.model, shown, y)
        alone, others_alone, p = mcnemar(right, others)
        kind = f"the paper's FGSM, eps {eps:g}" if eps else "clean"
        what = f"{name}, {len(y):,} images, {kind}"
        told = f"{alone} images right in float32 alone, {others_alone} in the other; p = {p:.2g}"
        rows.append(_row(what, "trained in float32", right, told))
        rows.append(_row(what, f"trained in {other.metadata['precision']}", others, ""))
    return rows


def _row(what: str, way: str, right: Tensor, note: str) -> Row:
    correct, n = int(right.sum()), len(right)
    low, high = (100 * bound for bound in wilson(correct, n))
    return Row("precision", what, way, 100 * correct / n, low, high, "%", note=note)
