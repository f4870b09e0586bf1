"""Thousands of damaged files: each is refused in our sentence, or is what it was.

Nothing crashes, hangs or is taken as good. Bytes are flipped, cut off, put
in and left out in real files of every kind that is read here; some inputs are bytes at random.
JPEG has no checksum, so a changed byte in one can't be told; a JPEG cut short is (test_files.py).
"""

import dataclasses
import hashlib
import shutil
import signal

import numpy as np
import pytest
import skimage.data
import torch
import victim
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import files
import owndata
import utils

pytestmark = pytest.mark.faults
LIMIT = 20  # seconds after which an input counts as hanging


@st.composite
def damaged(draw, original: bytes):
    """A file's content with one to three changes, or bytes at random."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        # headers are short and matter much, so half of the changes are near an end
        size = len(content)
        near = st.sampled_from([*range(min(64, size)), *range(max(0, size - 64), size), 0])
        place = draw(near if draw(st.booleans()) else st.sampled_from(range(size + 1)))
        place = min(place, max(0, size - 1))
        kind = draw(st.sampled_from(["flip", "byte", "cut", "insert", "delete", "repeat"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and content:
            content[place] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 8))]
        elif kind == "repeat":
            content[place:place] = content[: draw(st.integers(1, 64))]
    return bytes(content)


class Hang(BaseException):
    """What no reader takes for a damaged file."""


def try_all(original, count, attempt, tally):
    """Give `count` damaged versions of a file to `attempt`, which says whether all is well."""

    def hang(*arguments):
        raise Hang(f"no answer after {LIMIT} s")

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(original))
    def each(content):
        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(LIMIT)
        try:
            survived = attempt(content)
        except utils.UsageError as error:
            survived = len(str(error)) > 20 and "\n" not in str(error)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        tally.add("inputs", survived=survived)

    each()


both = pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])


@both
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_idx(name, count, full_data, run, tmp_path, tally, monkeypatch):
    """With the hashes of the small files for the published ones: only the same bytes are MNIST."""
    folder = shutil.copytree(full_data / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    known = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in files.MNIST_FILES}
    monkeypatch.setattr(files, "MNIST_FILES", known)
    full = dataclasses.replace(run, profile="full", data_dir=tmp_path)
    original = (folder / name).read_bytes()

    def attempt(content):
        (folder / name).write_bytes(content)
        parts = utils.load_mnist(full)
        same = hashlib.sha256(content).hexdigest() == known[name]
        return {part.source for part in parts} == {"full" if same else utils.NOT_PUBLISHED}

    try_all(original, count, attempt, tally)


@both
def test_png(count, tmp_path, tally):
    """A photograph's patch among images that are well."""
    photograph = skimage.data.astronaut()
    for name, place in (("cat", 100), ("dog", 200)):
        (tmp_path / name).mkdir()
        Image.fromarray(photograph[place : place + 24, :24]).save(tmp_path / name / "0.png")
    file = tmp_path / "cat" / "0.png"
    original, expected = file.read_bytes(), owndata.load_folder(tmp_path, "mine")

    def attempt(content):
        file.write_bytes(content)
        found = owndata.load_folder(tmp_path, "mine")
        return torch.equal(found.images, expected.images)

    try_all(original, count, attempt, tally)


@both
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, count, tmp_path, tally):
    file = tmp_path / "mine.npz"
    images = skimage.data.astronaut()[:32, :256].reshape(32, 8, 32, 3).transpose(1, 0, 2, 3)
    save(file, images=images, labels=np.arange(8) % 2)
    original, expected = file.read_bytes(), owndata.load_npz(file, "mine", ("a", "b"))

    def attempt(content):
        file.write_bytes(content)
        found = owndata.load_npz(file, "mine", ("a", "b"))
        same = torch.equal(found.images, expected.images)
        return same and torch.equal(found.labels, expected.labels)

    try_all(original, count, attempt, tally)


@both
def test_checkpoint(count, tmp_path, tally, capsys):
    """The checkpoint before takes over, or the damage was where nothing is read."""
    with pytest.raises(victim.Stop):
        victim.fit(tmp_path, stop_after=3)
    file = tmp_path / "toy.pt"
    original = file.read_bytes()
    whole = [torch.load(path, weights_only=True) for path in tmp_path.glob("toy.pt*")]
    expected = {victim.fingerprint(state) for state in whole}
    checkpoint = victim.settings(tmp_path).checkpoint("toy")

    def attempt(content):
        file.write_bytes(content)
        return victim.fingerprint(checkpoint._read()) in expected

    try_all(original, count, attempt, tally)
    assert len(expected) == 2
