"""Your own data: folders of images, pairs of images and masks, or arrays, as a `utils.Dataset`.

What does not fit gets one sentence, before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

import files
from utils import Dataset, UsageError


def load_folder(folder: Path, name: str, skip_unreadable: bool = False) -> Dataset:
    """Images of one size, in one folder per class; `source` tells JPEGs from other files."""
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:  # no folder, no class in it, or nothing in a class
        raise UsageError(f"{folder} needs a folder of images for each class: {error}.") from None
    paths, labels = [Path(path) for path, _ in found.samples], torch.tensor(found.targets)
    images, kept = files.read_images(paths, skip_unreadable=skip_unreadable)
    jpeg = any(path.suffix.lower() in (".jpg", ".jpeg") for path in paths)
    source = "JPEG copy" if jpeg else "PNG folders"
    return Dataset(
        name, source, _stack(images, [paths[k] for k in kept]), labels[kept], tuple(found.classes)
    )


def load_pairs(images: Path, masks: Path, name: str, classes: Sequence[str]) -> Dataset:
    """Images and their label maps, of one size, from two folders: matched by stem.

    A mask's pixels are class indices, or a palette's; 255 is ignored.
    """
    paths = []
    for folder in (Path(images), Path(masks)):
        found = sorted(path for path in folder.glob("*") if path.is_file())
        paths.append({path.stem: path for path in found})
        if not found:
            raise UsageError(f"{folder} is empty or not there: it needs an image for each scene.")
        if len(paths[-1]) < len(found):
            raise UsageError(f"{folder} has two files of one name, apart from their endings.")
    alone = sorted(set(paths[0]) ^ set(paths[1]))
    if alone:
        counts = f"{len(paths[0])} images in {images}, {len(paths[1])} masks in {masks}"
        more = f", nor have {len(alone) - 1} more" if len(alone) > 1 else ""
        raise UsageError(f"{counts}: {alone[0]} has no counterpart{more}.")
    pictures, maps = ([part[stem] for stem in sorted(part)] for part in paths)
    pixels = files.read_images(pictures)[0]
    labels = files.read_images(maps, mode=None)[0]
    for path, label, pixel in zip(maps, labels, pixels, strict=True):
        if label.dtype != np.uint8 or label.shape != pixel.shape[:2]:
            need = f"{pixel.shape[1]}x{pixel.shape[0]} class indices of one byte, as its image has"
            has = f"{'x'.join(map(str, label.shape[1::-1]))} of {label.dtype}, {label.ndim} axes"
            raise UsageError(f"{path} must be {need}, not {has}.")
    labels = _stack([label[:, :, None] for label in labels], maps)[:, 0]
    return Dataset(name, "own", _stack(pixels, pictures), labels, tuple(classes))


def load_npz(path: Path, name: str, classes: Sequence[str]) -> Dataset:
    """A file's `images`, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), and `labels`, integers."""
    images, labels = files.read_npz(path, ["images", "labels"])
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu":
        got = f"{images.dtype} and {labels.dtype}"
        raise UsageError(f"{path}: images must be uint8 and labels whole numbers, not {got}.")
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] > 4 and images.shape[3] in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
    return Dataset(name, "own", images.contiguous(), labels, tuple(classes))


def _stack(images: Sequence[np.ndarray], paths: Sequence[Path]) -> Tensor:
    """Images (H, W, C) of one size as (N, C, H, W)."""
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            first, other = ("x".join(map(str, i.shape[1::-1])) for i in (images[0], image))
            raise UsageError(f"{path} is {other} but {paths[0]} is {first}: give all one size.")
    if len(images) == 0:
        raise UsageError("No image could be read.")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
