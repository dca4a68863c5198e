"""Shapes-10: a procedural data set with the shapes and dtypes of CIFAR-10.

Ten kinds of figure, drawn at random position, size, rotation and colour on a shaded, textured,
noisy background with a few blots. It stands in for CIFAR-10 wherever that is neither present nor to
be downloaded, so that every lesson and test runs anywhere.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLASSES = (
    "disc",
    "ring",
    "square",
    "triangle",
    "star",
    "cross",
    "crescent",
    "heart",
    "bar",
    "hourglass",
)
SIZES = {"train": 50_000, "test": 10_000}

# Images are drawn in blocks with a random stream each, so the first n images are the same images
# however many are asked for.
_BLOCK = 500
_Array = NDArray[np.floating]


def _inside(kind: int, u: _Array, v: _Array) -> _Array:
    """Return how far each point (u, v) lies inside figure `kind`; negative outside it."""
    r = np.hypot(u, v)
    match CLASSES[kind]:
        case "disc":
            return 0.85 - r
        case "ring":
            return np.minimum(0.95 - r, r - 0.55)
        case "square":
            return 0.75 - np.maximum(abs(u), abs(v))
        case "triangle":
            return 0.5 - np.maximum(v, abs(u) * 0.866 - v * 0.5)
        case "star":
            turn = np.abs((np.arctan2(u, v) * 5 / (2 * np.pi)) % 1 - 0.5) * 2
            return 0.4 + 0.65 * turn - r
        case "cross":
            a, b = abs(u), abs(v)
            return 0.28 - np.minimum(np.maximum(a - 0.67, b), np.maximum(b - 0.67, a))
        case "crescent":
            return np.minimum(0.95 - r, np.hypot(u - 0.45, v) - 0.7)
        case "heart":
            x, y = abs(u) * 1.25, 0.15 - v * 1.25
            return 0.75 - np.hypot(x, (y - 0.6 * np.sqrt(x)) * 1.05)
        case "bar":
            return np.minimum(0.95 - abs(u), 0.25 - abs(v))
        case _:  # hourglass
            return np.minimum(0.8 - abs(v), (abs(v) + 0.12 - abs(u)) * 0.7)


def _draw_block(split: str, block: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw `_BLOCK` images (N, 3, 32, 32) uint8 with their labels (N,)."""
    n = _BLOCK
    rng = np.random.default_rng([10, sorted(SIZES).index(split), block])

    def draw(low: float, high: float, *shape: int) -> _Array:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    labels = rng.integers(0, len(CLASSES), n)
    axis = np.linspace(-1, 1, 32, dtype=np.float32)
    y, x = np.broadcast_to(axis[:, None], (n, 32, 32)), np.broadcast_to(axis, (n, 32, 32))

    # Background: a colour, a shading across it, a sine texture, and blots of other colours.
    base = draw(0.15, 0.85, 3, 1, 1)
    slope_x, slope_y = draw(-0.12, 0.12, 3, 1, 1), draw(-0.12, 0.12, 3, 1, 1)
    images = base + slope_x * x[:, None] + slope_y * y[:, None]
    wave = np.sin(draw(-9, 9, 1, 1) * x + draw(-9, 9, 1, 1) * y + draw(0, 6.3, 1, 1))
    images += draw(0, 0.06, 1, 1, 1) * wave[:, None]
    for _ in range(3):
        spot = np.hypot(x - draw(-1, 1, 1, 1), y - draw(-1, 1, 1, 1))
        weight = np.clip((draw(0.08, 0.2, 1, 1) - spot) * 16, 0, 1)[:, None] * 0.6
        images += weight * (draw(0, 1, 3, 1, 1) - images)

    # The figure: moved, turned, scaled; its colour differs from the background's in some channel.
    angle, size = draw(-0.6, 0.6, 1, 1), draw(0.5, 0.8, 1, 1)
    dx, dy = x - draw(-0.25, 0.25, 1, 1), y - draw(-0.25, 0.25, 1, 1)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / size
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / size
    depth = np.empty_like(u)
    for kind in range(len(CLASSES)):
        chosen = labels == kind
        depth[chosen] = _inside(kind, u[chosen], v[chosen])
    mask = np.clip(depth * size * 12 + 0.5, 0, 1)[:, None]
    sign = np.where(base < 0.5, 1, -1)
    colour = base + sign * draw(0.1, 0.45, 3, 1, 1)
    stripes = np.sin(draw(-12, 12, 1, 1) * u + draw(-12, 12, 1, 1) * v)[:, None]
    images += mask * (colour + draw(0, 0.06, 1, 1, 1) * stripes - images)

    noise = rng.standard_normal(images.shape, dtype=np.float32)
    images += draw(0.01, 0.05, 1, 1, 1) * noise
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8), labels


def draw_shapes(split: str, size: int) -> tuple[Tensor, Tensor]:
    """Draw the first `size` images of Shapes-10.

    Args:
        split: "train" (50,000 images) or "test" (10,000).
        size: How many.

    Returns:
        Images (size, 3, 32, 32) uint8 and labels (size,) int64; the same at every call.

    Raises:
        ValueError: if there is no such split, or it has fewer images.
    """
    if split not in SIZES or not 1 <= size <= SIZES[split]:
        raise ValueError(f"no {size} images in split {split!r}; Shapes-10 has {SIZES}")
    blocks = [_draw_block(split, block) for block in range(-(-size // _BLOCK))]
    images = np.concatenate([images for images, _ in blocks])[:size]
    labels = np.concatenate([labels for _, labels in blocks])[:size]
    return torch.from_numpy(images), torch.from_numpy(labels)
