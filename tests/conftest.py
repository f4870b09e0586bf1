"""Small data sets on disk, and the models as the notebooks define them."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def notebook_cells(name: str, tag: str) -> list[str]:
    """The source of the notebook's cells that carry a tag."""
    notebook = json.loads((ROOT / name).read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if tag in c["metadata"].get("tags", [])]
    return ["".join(cell["source"]) for cell in cells]


def notebook_definitions(name: str) -> SimpleNamespace:
    """What the notebook's cells tagged `definition` define, by name."""
    namespace = {"torch": torch, "nn": nn}
    for source in notebook_cells(name, "definition"):
        exec(source, namespace)
    return SimpleNamespace(**namespace)


@pytest.fixture(scope="session")
def classification():
    return notebook_definitions("imageclassification.ipynb")


@pytest.fixture(scope="session")
def segmentation():
    return notebook_definitions("imagesegmentation.ipynb")


@pytest.fixture
def run():
    """Quick settings on the CPU in float32, whatever the machine has."""
    return utils.Settings("quick", ROOT / "data", None, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def full_data(tmp_path_factory):
    """A DATA_DIR with tiny files in the formats of the full data: idx, and image folders."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 120), ("t10k", 40)):
        images = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        raw = folder / "MNIST" / "raw"
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    for part, count in (("train", 10), ("test", 4)):
        for name in CIFAR_CLASSES:
            (folder / "cifar10" / part / name).mkdir(parents=True)
            for number in range(count):
                image = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                file = folder / "cifar10" / part / name / f"{number:04}.png"
                Image.fromarray(image).save(file)
    return folder
