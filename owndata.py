"""Your own data: folders of images, pairs of images and masks, or arrays, as a `utils.Dataset`.

What does not fit is refused in a sentence or two, before anything is trained on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import files
from utils import IGNORE, Dataset, UsageError, split


def load_pictures(
    folder: str | Path, size: int | None = None, name: str = ""
) -> tuple[Dataset, Dataset]:
    """Images in one folder per class, as (training, test), see `load_folder`.

    Folders train/ and test/ in it are the two; without them, a fifth is held out for testing.
    """
    folder = Path(folder)
    return _parts(folder, lambda part: load_folder(part, name or folder.name, size))


def load_scenes(folder: str | Path, size: int | None = None) -> tuple[Dataset, Dataset]:
    """Pairs in images/ and masks/, or in both of train/ and test/, as (training, test).

    The names of the classes are the lines of classes.txt, or "class 0" and so on; one called void
    is neither learned nor scored. See `load_pairs`.
    """
    folder = Path(folder)
    names = folder / "classes.txt"
    try:
        text = names.read_text(encoding="utf-8-sig").strip() if os.path.exists(names) else ""
    except UnicodeDecodeError:
        raise UsageError(f"{names} is not in UTF-8: save it so.") from None
    except OSError as error:
        raise UsageError(f"{names} cannot be read ({files.reason(error)}).") from None
    classes = [name.strip() for name in text.split("\n")] if text else []
    if "" in classes:
        raise UsageError(f"{names} has an empty line {classes.index('') + 1}: name that class.")
    void = classes.index("void") if "void" in classes else IGNORE

    def load(part: Path) -> Dataset:
        return load_pairs(part / "images", part / "masks", folder.name, classes, size, void)

    return _parts(folder, load)


def _parts(folder: Path, load: Callable[[Path], Dataset]) -> tuple[Dataset, Dataset]:
    """(training, test): what is in train/ and in test/, or all, a fifth of it held out."""
    parts = folder / "train", folder / "test"
    if not all(map(os.path.isdir, parts)):
        return split(load(folder), share=0.2, seed=1)
    training, test = map(load, parts)
    if training.classes != test.classes:
        raise UsageError(
            f"{folder}: train/ and test/ must have the same classes: folders of the same names, or "
            "for masks a classes.txt."
        )
    return training, test


def load_folder(
    folder: str | Path, name: str, size: int | None = None, skip_unreadable: bool = False
) -> Dataset:
    """Images in one folder per class, grey or in colour, as uint8 RGB (N, 3, size, size).

    Each is squeezed to size x size pixels; without a size they must be of one. Labels are int64
    (N), the places of the folders' names in alphabetical order. What cannot be read is refused, or
    with `skip_unreadable` named and left out; a class's folder has no folder in it. Raises
    UsageError.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder: it needs a folder of images for each class.")
    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    inside = [(path, n) for n, name in enumerate(classes) for path in _listed(folder / name)]
    found = [(path, n) for path, n in inside if path.suffix.lower() in IMG_EXTENSIONS]
    others = [path for path, _ in inside if path.suffix.lower() not in IMG_EXTENSIONS]
    if deep := [path for path in others if path.is_dir()]:
        raise UsageError(
            f"{deep[0]} is a folder in that of a class: give each class a folder of images, "
            "in one folder, or in train/ and test/."
        )
    if others:
        more = f", and {len(others) - 1} more" if others[1:] else ""
        print(f"left out, not of a kind that is read: {others[0]}{more}")
    if not found:
        raise UsageError(f"{folder} needs a folder of images for each class: there is no image.")
    paths, labels = [path for path, _ in found], torch.tensor([number for _, number in found])
    both = None if size is None else (size, size)
    images, kept = files.read_images(paths, "RGB", both, skip_unreadable)
    empty = sorted(set(range(len(classes))) - set(labels[kept].tolist()))
    if empty and kept:
        raise UsageError(f"{folder / classes[empty[0]]} has no image that can be read.")
    pixels = _stack(images, [paths[k] for k in kept])
    return Dataset(name, "own", pixels, labels[kept], tuple(classes))


def _listed(folder: Path) -> list[Path]:
    """What a folder holds, by name, but for what systems hide there; nothing if it is not there."""
    seen = [p for p in folder.glob("[!.]*") if p.name.lower() not in ("thumbs.db", "desktop.ini")]
    return sorted(seen, key=lambda path: path.name)  # Windows' own order ignores case


def load_pairs(
    images: str | Path,
    masks: str | Path,
    name: str,
    classes: Sequence[str] = (),
    size: int | None = None,
    ignore: int = IGNORE,
) -> Dataset:
    """Images and their label maps from two folders, matched by stem, all squeezed to one size.

    Images become uint8 RGB (N, 3, size, size), maps uint8 (N, size, size); without a size all must
    be of one. A mask's pixels are class indices of one byte, or a palette's, and not of a JPEG,
    whose compression changes them; `ignore` and 255 are neither learned nor scored; a class of that
    number has no name and no output, and those after it move up by one. Raises UsageError.
    """
    if not 0 <= ignore <= IGNORE:
        raise UsageError(f"ignore is {ignore}: a mask's pixels are 0 to {IGNORE}.")
    paths = []
    for folder in (Path(images), Path(masks)):
        found = [path for path in _listed(folder) if path.is_file()]
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
    _check_masks(pictures, maps)
    both = None if size is None else (size, size)
    pixels = files.read_images(pictures, "RGB", both)[0]
    labels = files.read_images(maps, None, both)[0]
    for path, label in zip(maps, labels, strict=True):
        if label.dtype != np.uint8 or label.ndim != 2:
            has = f"{label.ndim} axes of {label.dtype}"
            raise UsageError(f"{path} must hold class indices of one byte a pixel, not {has}.")
        highest = int(label[(label != ignore) & (label != IGNORE)].max(initial=0))
        if 0 < len(classes) <= highest:
            raise UsageError(f"{path} has a pixel of class {highest}, of {len(classes)} from 0 on.")
    labels = _stack([label[:, :, None] for label in labels], maps)[:, 0]
    return Dataset(name, "own", _stack(pixels, pictures), *_classes(labels, classes, ignore))


def _check_masks(pictures: Sequence[Path], maps: Sequence[Path]) -> None:
    """Refuse a mask that is a JPEG, or not as large as its image; only files' headers are read."""
    for picture, mask in zip(pictures, maps, strict=True):
        try:
            with Image.open(picture) as one, Image.open(mask) as other:
                turned = one.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                shown = one.size[::-1] if turned else one.size  # as read_image turns it
                sizes = ["x".join(map(str, size)) for size in (shown, other.size)]
                lossy = other.format in ("JPEG", "MPO")
        except Exception:  # a file that is no image is named when it is read
            continue
        if lossy:
            raise UsageError(f"{mask} is a JPEG, which blurs the classes: save masks as PNG.")
        if sizes[0] != sizes[1]:
            raise UsageError(f"{mask} is {sizes[1]} but its image {picture} is {sizes[0]}.")


def load_npz(path: str | Path, name: str, classes: Sequence[str] = ()) -> Dataset:
    """A file's `images`, uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), and `labels`.

    Labels are integers (N) or (N, H, W), class indices or 255, which is ignored. Images become
    (N, C, H, W). Raises UsageError.
    """
    images, labels = files.read_npz(path, ["images", "labels"])
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu":
        got = f"{images.dtype} and {labels.dtype}"
        raise UsageError(f"{path}: images must be uint8 and labels whole numbers, not {got}.")
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] <= 4 < images.shape[1]:
        images = images.permute(0, 3, 1, 2)
    return Dataset(name, "own", images.contiguous(), *_classes(labels, classes))


def from_torchvision(
    dataset: Iterable, name: str, classes: Sequence[str] = (), size: int = 32
) -> Dataset:
    """What yields (PIL image, class or PIL mask), torchvision.datasets.VOCSegmentation say.

    Images become uint8 RGB (N, 3, size, size), squeezed; classes, integers, int64 (N); masks, of
    one byte a pixel, uint8 (N, size, size), each pixel the nearest one's. 255 is ignored. Raises
    UsageError.
    """
    images, labels = [], []
    for image, label in dataset:
        if not isinstance(image, Image.Image) or not isinstance(label, (Integral, Image.Image)):
            got = f"{type(image).__name__} and {type(label).__name__}"
            raise UsageError(f"{name} must yield PIL images with a class or a mask, not {got}.")
        try:
            image = files.as_seen(image, "RGB")
        except ValueError as error:
            raise UsageError(f"{name}: image {len(images)} can't be used: {error}.") from None
        images.append(np.array(image.resize((size, size), Image.Resampling.BILINEAR)))
        if isinstance(label, Image.Image):
            label = np.array(label.resize((size, size), Image.Resampling.NEAREST))
            if label.dtype != np.uint8 or label.ndim != 2:
                has = f"{label.ndim} axes of {label.dtype}"
                raise UsageError(f"{name}: masks must have one byte a pixel, not {has}.")
        if labels and np.shape(label) != np.shape(labels[0]):
            raise UsageError(f"{name} must yield classes alone, or masks alone.")
        labels.append(label)
    if not images:
        raise UsageError(f"{name}: there are no images.")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(np.stack(labels))
    labels = labels if labels.ndim == 3 else labels.long()
    return Dataset(name, "own", pixels, *_classes(labels, classes))


def _classes(
    labels: Tensor, classes: Sequence[str], ignore: int = IGNORE
) -> tuple[Tensor, tuple[str, ...]]:
    """(labels with IGNORE for `ignore`, names of the classes: those given, or numbers)."""
    counted = labels[(labels != IGNORE) & (labels != ignore)].unique()
    if len(counted) < 2:
        only = ", ".join(str(label) for label in counted.tolist()) or "none"
        ignored = IGNORE if ignore == IGNORE else f"{ignore} or {IGNORE}"
        raise UsageError(
            f"The labels hold fewer than two classes ({only}) besides {ignored}, which is ignored: "
            "number the classes 0, 1 and so on."
        )
    highest = min(int(counted.max()), IGNORE - 1)  # Dataset refuses what is higher
    names = list(map(str, classes)) or [f"class {number}" for number in range(highest + 1)]
    if ignore != IGNORE:
        labels = labels.masked_fill(labels == ignore, IGNORE)
    if 0 <= ignore < len(names):  # a model has no output for it, so those after it move up
        del names[ignore]
        labels = labels - ((labels > ignore) & (labels != IGNORE)).to(labels.dtype)
    return labels, tuple(names)


def _stack(images: Sequence[np.ndarray], paths: Sequence[Path]) -> Tensor:
    """Images (H, W, C) of one size as (N, C, H, W)."""
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            first, other = ("x".join(map(str, i.shape[1::-1])) for i in (images[0], image))
            raise UsageError(f"{path} is {other} but {paths[0]} is {first}: give all one size.")
    if len(images) == 0:
        raise UsageError("No image could be read.")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
