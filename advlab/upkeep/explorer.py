"""What the site's explorer shows: attacks of the panel, made beforehand, for a page without Python.

The page (`site_pages/_static/explorer.js`) is opened from a disk, where a browser reads no files
but scripts and pictures. So each image is a script that holds one sprite (a PNG) and the answers.
"""

import base64
import io
import json
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from advlab import checkpoints, datasets, files
from advlab.catalogue import ATTACKS
from advlab.data import ImageData
from advlab.forward import predict
from advlab.plots import as_picture
from advlab.widgets import STEPPED, TARGETED, craft

MODELS = ("cnn-baseline-seed0", "cnn-robust-seed0")  # files of data/checkpoints
# Of the panel's, those that are made within seconds.
CHOICES = ("fgsm", TARGETED, STEPPED, "fgsm-per-image", "noise", "rfgsm", "mi-fgsm")
EPS = (0, 1, 2, 4, 8, 16, 32)  # in steps of 1/255
SEARCHED = 500  # test images among which one of each class is chosen
COLUMNS = 16  # of a sprite


def open_models(data: ImageData) -> dict[str, nn.Module]:
    """Return the two networks by name; none where a shipped one is missing or of other data."""
    paths = [files.shipped_checkpoints() / f"{name}.safetensors" for name in MODELS]
    if not all(path.is_file() for path in paths):
        return {}
    opened = [checkpoints.load(path) for path in paths]
    if any(one.metadata["data"] != data.name for one in opened):
        return {}
    return {one.name: one.model for one in opened}


def choose(models: Mapping[str, nn.Module], data: ImageData) -> list[int]:
    """Return the index of one test image of each class, the first that every model gets right."""
    images, labels = data.test.batch(slice(0, SEARCHED))
    right = torch.ones(len(labels), dtype=torch.bool)
    for model in models.values():
        right &= predict(model, images).argmax(1).cpu() == labels.cpu()
    found = [(right & (labels.cpu() == k)).nonzero()[:1, 0] for k in range(len(data.classes))]
    return [int(index) for index in torch.cat(found)]


def _shares(model: nn.Module, images: Tensor, classes: int) -> list[list[int]]:
    """Return the probabilities of each image in thousandths."""
    shares = predict(model, images)[:, :classes].softmax(1)
    return (1000 * shares).round().int().tolist()


def _in_8_bits(images: Tensor) -> Tensor:
    return (255 * images).round()


def _measure(
    models: Mapping[str, nn.Module], made: Tensor, images: Tensor, classes: int
) -> list[dict[str, Any]]:
    """Return for each attacked image what the panel tells of it (see `widgets.Outcome`)."""
    after = {name: _shares(model, made, classes) for name, model in models.items()}
    first = models[next(iter(models))]
    both = (predict(first, shown)[:, :classes] for shown in (made, _in_8_bits(made) / 255))
    as_floats, as_bytes = (logits.argmax(1) for logits in both)
    change = (made - images).flatten(1)
    linf, l2 = 255 * change.abs().amax(1), change.norm(dim=1)
    return [
        {
            "after": [shares[i] for shares in after.values()],
            "linf": round(float(linf[i]), 1),
            "l2": round(float(l2[i]), 2),
            "survives": bool(as_floats[i] == as_bytes[i]),
        }
        for i in range(len(made))
    ]


def _sprite(tiles: list[Tensor]) -> str:
    """Return tiles as one PNG, row by row, as an address.

    Args:
        tiles: (C, H, W) whole numbers from 0 to 255.
    """
    rows = -(-len(tiles) // COLUMNS)
    height, width = tiles[0].shape[1:]
    sheet = np.full((rows * height, COLUMNS * width, 3), 128, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top, left = height * (place // COLUMNS), width * (place % COLUMNS)
        sheet[top : top + height, left : left + width] = as_picture(tile.byte())
    written = io.BytesIO()
    Image.fromarray(sheet).save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def compute(
    models: Mapping[str, nn.Module], data: ImageData, chosen: list[int]
) -> list[dict[str, Any]]:
    """Attack the chosen test images in every way that the page offers.

    Returns:
        For each image its sprite (the image, then the changes: 128 for none), the probabilities
        before, and `made`: by "attack|source|target" (target: number of the class, or nothing) the
        place of the first tile, and what was measured at each eps but 0.
    """
    images, labels = data.test.batch(torch.tensor(chosen))
    count = len(data.classes)
    pages: list[dict[str, Any]] = [{"made": {}} for _ in chosen]
    tiles = [[tile] for tile in _in_8_bits(images)]
    before = [_shares(model, images, count) for model in models.values()]
    for attack, source in product(CHOICES, models):
        for target in range(count) if attack == TARGETED else [None]:
            # No image can be moved towards the class that it is of.
            places = [place for place in range(len(chosen)) if int(labels[place]) != target]
            if not places:
                continue
            x, y = images[places], labels[places]
            name = f"{attack}|{source}|{'' if target is None else target}"
            for place in places:
                pages[place]["made"][name] = {"tile": len(tiles[place]), "at": []}
            for eps in EPS[1:]:
                made = craft(models[source], x, y, attack, eps / 255, target=target or 0)
                changes = 128 + _in_8_bits(made) - _in_8_bits(x)
                found = _measure(models, made, x, count)
                for place, tile, told in zip(places, changes, found, strict=True):
                    tiles[place].append(tile)
                    pages[place]["made"][name]["at"].append(told)
    for place, page in enumerate(pages):
        page["sprite"] = _sprite(tiles[place])
        page["before"] = [shares[place] for shares in before]
    return pages


def _script(text: str, value: Any) -> bytes:
    return f"{text}({json.dumps(value, separators=(',', ':'))});\n".encode()


def scripts(dataset: str = "auto", data_dir: str = "auto") -> dict[str, bytes]:
    """Return the page's data as scripts, by the names of their files.

    Args:
        dataset, data_dir: As in `datasets.load`.

    Returns:
        data.js, which says what there is, and image0.js ... for the images; data.js alone, which
        says why, where no trained model is of that data set.
    """
    data = datasets.load(dataset, data_dir, train_n=1, test_n=SEARCHED)
    models = open_models(data)
    if not models:
        told = (
            f"This site was built with {data.name}, and the repository ships no trained model for "
            "it. Build it with CIFAR-10 (ADVLAB_DATA) to attack images here."
        )
        return {"data.js": _script("Explorer.start", {"told": told})}
    chosen = choose(models, data)
    about = {
        "data": data.name,
        "side": data.shape[1],
        "columns": COLUMNS,
        "classes": list(data.classes),
        "models": list(models),
        "eps": EPS,
        "targeted": TARGETED,
        "attacks": [
            {"name": name, "gradient": name not in ATTACKS or ATTACKS[name].gradient}
            for name in CHOICES
        ],
        "images": [{"index": index, "label": int(data.test.labels[index])} for index in chosen],
    }
    made = {"data.js": _script("Explorer.start", about)}
    for place, page in enumerate(compute(models, data, chosen)):
        made[f"image{place}.js"] = _script("Explorer.take", {"place": place, **page})
    return made
