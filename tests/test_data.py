"""Every data set is real, repeatable, and apart from what it must be apart from."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import requests
import torch
import torchvision
from PIL import Image

import owndata
import samples
import utils
from conftest import CIFAR_CLASSES


def same_images(a, b):
    """How many images of `a` are, byte for byte, also in `b`."""
    known = {image.numpy().tobytes() for image in b.images}
    return sum(image.numpy().tobytes() in known for image in a.images)


def toy(n=100, classes=10, groups=None):
    """A data set whose image i is filled with the number i."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    names = tuple(f"class {c}" for c in range(classes))
    return utils.Dataset("toy", "sample", images, torch.arange(n) % classes, names, groups)


# ---- the 80/20 split


def test_split_deals_every_example_to_one_side():
    training, validation = utils.split(toy(), share=0.2, seed=0)
    assert (len(training), len(validation)) == (80, 20)
    numbers = torch.cat([training.images, validation.images])[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(100))
    assert (training.labels == training.images[:, 0, 0, 0] % 10).all()


def test_split_depends_on_the_seed_alone():
    first, again, other = (utils.split(toy(), seed=seed)[1].images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_split_keeps_groups_together():
    groups = torch.arange(100) // 5
    training, validation = utils.split(toy(groups=groups), share=0.2, seed=0)
    assert not set(training.groups.tolist()) & set(validation.groups.tolist())
    assert (len(training), len(validation)) == (80, 20)


def test_a_group_too_large_to_hold_out_takes_no_place_of_others():
    groups = torch.cat([torch.zeros(30, dtype=torch.int64), torch.arange(1, 31)])
    for seed in range(20):
        training, validation = utils.split(toy(60, groups=groups), share=0.2, seed=seed)
        assert len(validation) == 12 and (training.groups == 0).sum() == 30


@pytest.mark.parametrize("groups", [None, torch.zeros(2)])
def test_what_is_too_small_to_split_is_refused(groups):
    with pytest.raises(utils.UsageError, match="toy is too small to hold 20% of it out"):
        utils.split(toy(2, groups=groups))


def test_a_split_leaves_something_to_train_on():
    with pytest.raises(utils.UsageError, match="with 100% held out, nothing is left"):
        utils.split(toy(), share=1.0)


def test_a_seed_is_no_negative_number():
    with pytest.raises(utils.UsageError, match="A seed is -1"):
        utils.split(toy(), seed=-1)


# ---- the samples


def test_mnist_sample_is_real_digits_without_overlap(run):
    training, test = utils.load_mnist(run)
    training, validation = utils.split(training)
    assert [len(part) for part in (training, validation, test)] == [3200, 800, 1000]
    assert test.labels.bincount().tolist() == [100] * 10
    assert training.images.shape[1:] == (1, 28, 28) and training.images.max() == 255
    assert same_images(test, training) == same_images(test, validation) == 0
    assert same_images(validation, training) == 0


def test_photograph_sample_has_ten_classes(run):
    training, test = utils.load_cifar10(run)
    assert training.images.shape == (3000, 3, 32, 32) and test.images.shape == (1000, 3, 32, 32)
    assert training.labels.bincount().tolist() == [300] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert training.images.float().mean(1).std((1, 2)).min() > 10  # no empty patch


def test_photograph_patches_share_no_pixel_between_parts(monkeypatch):
    """Every pixel carries its own number, so what a patch is made of can be read off it."""
    height, width = 400, 600
    number = torch.arange(height * width).view(height, width)
    numbered = torch.stack([number % 256, number // 256 % 256, number // 65536]).to(torch.uint8)
    monkeypatch.setattr(samples, "_photograph", lambda name: numbered)
    training, test = samples.load_photographs.__wrapped__()  # not what is cached
    training, validation = utils.split(training)

    def pixels(part):
        return set(
            (part.images.long() * torch.tensor([1, 256, 65536]).view(3, 1, 1))
            .sum(1)
            .flatten()
            .tolist()
        )

    # here all ten are the same photograph, each dealt out anew, so look at one class at a time
    for label in range(10):
        parts = [
            p.subset((p.labels == label).nonzero()[:, 0]) for p in (training, validation, test)
        ]
        assert all(len(part) > 20 for part in parts)
        a, b, c = map(pixels, parts)
        assert not a & b and not a & c and not b & c


def test_samples_are_repeatable(run):
    for load in (samples.load_digits, samples.load_photographs):
        for one, again in zip(load(), load.__wrapped__(), strict=True):  # not what is cached
            assert torch.equal(one.images, again.images) and torch.equal(one.labels, again.labels)
    for one, again in zip(utils.load_scenes(run), utils.load_scenes(run), strict=True):
        assert torch.equal(one.images, again.images) and torch.equal(one.labels, again.labels)


# ---- MNIST-on-CIFAR-10


def coded_digits(n):
    """Digit i: a full first row to find it by, then i in binary, two rows of ink or none."""
    images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 0] = 255
    bits = torch.arange(n)[:, None] >> torch.arange(12) & 1
    images[:, :, 2:26] = 255 * bits.repeat_interleave(2, 1)[:, None, :, None].to(torch.uint8)
    return utils.Dataset("coded digits", "full", images, torch.arange(n) % 10, tuple("0123456789"))


def coded_backgrounds(n):
    """Background i: one colour, which is i in base 256."""
    colour = torch.stack([torch.arange(n) % 256, torch.arange(n) // 256, torch.arange(n) * 0], 1)
    images = colour[:, :, None, None].expand(n, 3, 32, 32).to(torch.uint8).contiguous()
    labels = torch.arange(n) // 7 % 10
    return utils.Dataset("coded backgrounds", "full", images, labels, tuple(CIFAR_CLASSES))


def decode(scenes):
    """Which digit and which background each scene was made of, and where the digit stands."""
    digits, backgrounds, places = [], [], []
    for image, label in zip(scenes.images.long(), scenes.labels, strict=True):
        ys, xs = (label < 10).nonzero(as_tuple=True)
        top, left = int(ys.min()), int(xs.min())
        bits = (label[top + 2 : top + 26 : 2, left] < 10).long()
        digits.append(int((bits << torch.arange(12)).sum()))
        y, x = (label >= 10).nonzero()[0]
        backgrounds.append(int(image[0, y, x] + 256 * image[1, y, x]))
        places.append((top, left))
    return digits, backgrounds, places


def test_each_scene_has_its_own_digit_and_background():
    scenes = utils.compose_scenes(coded_digits(600), coded_backgrounds(500), seed=0)
    digits, backgrounds, places = decode(scenes)
    assert backgrounds == list(range(500))
    assert len(set(digits)) == 500 and digits != sorted(digits)
    assert set(places) == {(y, x) for y in range(5) for x in range(5)}
    for scene, (digit, background) in enumerate(zip(digits, backgrounds, strict=True)):
        expected = {digit % 10, 10 + background // 7 % 10}
        assert set(scenes.labels[scene].unique().tolist()) == expected


def test_where_backgrounds_are_more_than_digits_each_digit_is_used_about_as_often():
    digits, _, _ = decode(utils.compose_scenes(coded_digits(20), coded_backgrounds(50), seed=0))
    assert {digits.count(number) for number in range(20)} == {2, 3}


def test_a_data_set_is_one_line_where_it_is_printed_or_shown():
    scenes = utils.compose_scenes(coded_digits(600), coded_backgrounds(500), seed=0)
    assert repr(scenes) == str(scenes)
    assert str(scenes).endswith(": 500 images 3x32x32, label maps of 20 classes")


def test_the_scene_split_shares_neither_digits_nor_backgrounds():
    parts = utils.split(utils.compose_scenes(coded_digits(600), coded_backgrounds(500), seed=0))
    (digits, backgrounds, _), (other_digits, other_backgrounds, _) = map(decode, parts)
    assert (len(digits), len(other_digits)) == (400, 100)
    assert not set(digits) & set(other_digits)
    assert not set(backgrounds) & set(other_backgrounds)


def test_a_pixel_is_its_digit_where_the_ink_is_over_one_half():
    digits, backgrounds = coded_digits(1), coded_backgrounds(1)
    digits.images[:] = 127  # 127 / 255 is under one half
    digits.images[0, 0, 5, 5] = 128
    labels = utils.compose_scenes(digits, backgrounds, seed=0).labels
    assert (labels == 0).sum() == 1 and (labels == 10).sum() == 32 * 32 - 1


def test_backgrounds_are_numbered_after_the_digits():
    digits, backgrounds = coded_digits(600), coded_backgrounds(500)
    letters = dataclasses.replace(digits, classes=tuple("abcdefghijkl"))
    scenes = utils.compose_scenes(letters, backgrounds, seed=0)
    assert scenes.labels[scenes.labels >= 10].min() == 12 and scenes.labels.max() == 21
    assert scenes.classes[12] == backgrounds.classes[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_digit_is_blended_by_its_ink(seed):
    digits, backgrounds = coded_digits(1), coded_backgrounds(1)
    backgrounds.images[:] = 200
    digits.images[:] = 51  # a fifth of ink
    digits.images[0, 0, 0] = 255  # and one row of full ink, which shows the colour
    scene = utils.compose_scenes(digits, backgrounds, seed)
    y, x = (scene.labels[0] == 0).nonzero()[0]
    colour, faint = scene.images[0, :, y, x].float(), scene.images[0, :, y + 1, x].float()
    torch.testing.assert_close(faint, (0.2 * colour + 0.8 * 200).round(), atol=1.0, rtol=0)
    assert (scene.images[0, :, y + 28 :] == 200).all() and (scene.images[0, :, :y] == 200).all()


def test_scenes_are_made_of_their_own_part_only(run):
    """Each scene's background is its part's photograph of that number; its digit is its part's."""
    photographs, digits = utils.load_cifar10(run), utils.load_mnist(run)
    inks = [part.images[:, 0] > 127 for part in digits]
    for part, scenes in enumerate(utils.load_scenes(run)):
        assert scenes.classes[10:] == photographs[part].classes
        kept = (scenes.images == photographs[part].images).all(1)
        assert (kept.flatten(1).float().mean(1) > 0.3).all()  # all that is not under ink
        for labels in scenes.labels[::100] < 10:
            windows = [labels[y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
            whole = [window for window in windows if window.sum() == labels.sum()]
            found = [any((ink == w).all((1, 2)).any() for w in whole) for ink in inks]
            assert found == [part == 0, part == 1]


# ---- the full data, in small


def test_full_data_is_read_from_files(full_data, run):
    full = dataclasses.replace(run, profile="full", data_dir=full_data)
    digits, digits_test = utils.load_mnist(full)
    assert digits.images.shape == (120, 1, 28, 28) and digits_test.images.shape == (40, 1, 28, 28)
    raw = (full_data / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    assert digits.images.numpy().tobytes() == raw and digits.source == utils.NOT_PUBLISHED
    images, images_test = utils.load_cifar10(full)
    assert images.images.shape == (100, 3, 32, 32) and images_test.images.shape == (40, 3, 32, 32)
    assert images.classes == tuple(CIFAR_CLASSES) and images.source == "PNG folders"
    assert images.labels.bincount().tolist() == [10] * 10
    scenes, scenes_test = utils.load_scenes(full)
    assert (len(scenes), len(scenes_test), len(scenes.classes)) == (100, 40, 20)


def test_folders_with_jpegs_are_called_a_jpeg_copy(run, tmp_path):
    folder = tmp_path / "cifar10"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / part / name / "0.jpg")
    full = dataclasses.replace(run, profile="full", data_dir=tmp_path)
    assert {part.source for part in utils.load_cifar10(full)} == {"JPEG copy"}
    assert owndata.load_folder(folder / "train", "mine").source == "own"


@pytest.mark.parametrize(
    "load, file", [("mnist", "t10k-labels-idx1-ubyte.gz"), ("cifar10", "cifar-10-python.tar.gz")]
)
def test_without_data_and_network_the_way_out_is_named(monkeypatch, tmp_path, run, load, file):
    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr("requests.get", no_network)
    monkeypatch.setattr("files.PAUSE", 0.01)
    full = dataclasses.replace(run, profile="full", data_dir=tmp_path / "data")
    with pytest.raises(utils.UsageError) as refused:
        getattr(utils, f"load_{load}")(full)
    sentence = str(refused.value)
    assert "could not be downloaded" in sentence and str(tmp_path) in sentence
    assert file in sentence and "PROFILE=quick" in sentence


# ---- what a data set must be


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(images=torch.zeros(100, 3, 4, 4)), "images must be uint8"),
        (dict(images=torch.zeros(100, 4, 4, dtype=torch.uint8)), "images must be uint8"),
        (dict(labels=torch.zeros(99).long()), "labels must be one per image"),
        (dict(labels=torch.zeros(100, 4, 5).long()), "labels must be one per image"),
        (dict(labels=torch.zeros(100)), "labels must be uint8 or int64, not float32"),
        (dict(labels=torch.full((100,), 10)), "100 labels are out of range 0 to 9, 10 for one"),
        (dict(labels=torch.full((100,), -1)), "100 labels are out of range 0 to 9, -1 for one"),
    ],
)
def test_bad_data_gets_one_sentence(change, sentence):
    with pytest.raises(utils.UsageError, match=f"toy: {sentence}"):
        dataclasses.replace(toy(), **change)


def test_groups_are_one_for_each_image():
    with pytest.raises(utils.UsageError, match="toy: groups must be one per image, not 5 for 100"):
        toy(groups=torch.zeros(5))


def test_an_empty_data_set_is_refused():
    nothing = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(utils.UsageError, match="toy: there are no images"):
        utils.Dataset("toy", "sample", nothing, torch.zeros(0).long(), ("one",))


def test_statistics_are_one_for_each_channel(run):
    for given in (([0.5], [0.2]), (0.5, 0.2)):
        with pytest.raises(utils.UsageError, match="toy: statistics must be .* channel: 3 of both"):
            utils.Batches(toy(), 5, run, given)


def test_backgrounds_are_in_colour_and_have_a_class():
    backgrounds = coded_backgrounds(20)
    grey = dataclasses.replace(backgrounds, images=backgrounds.images[:, :1])
    some = torch.where(torch.arange(20) > 0, backgrounds.labels, utils.IGNORE)
    for other in (grey, dataclasses.replace(backgrounds, labels=some)):
        with pytest.raises(utils.UsageError, match="backgrounds must be in colour, each with a cl"):
            utils.compose_scenes(coded_digits(20), other, seed=0)


def test_statistics_are_those_of_all_pixels(run):
    dataset, _ = utils.load_cifar10(run)
    mean, std = dataset.statistics()
    pixels = dataset.images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std(1, correction=0), atol=1e-6, rtol=0
    )


def test_cifar10_as_it_is_published(tmp_path, run, monkeypatch):
    """In files of its format, whose checksums are taken for the published ones."""
    cifar, draws = torchvision.datasets.CIFAR10, np.random.default_rng(0)
    folder = tmp_path / "data" / cifar.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    written = []
    for part in ("train_list", "test_list"):
        known = []
        for name, _ in getattr(cifar, part):
            pixels = draws.integers(256, size=(4, 3, 32, 32), dtype=np.uint8)
            labels = draws.integers(10, size=4).tolist()
            written.append((pixels, labels))
            known.append([name, write(name, dict(data=pixels.reshape(4, -1), labels=labels))])
        monkeypatch.setattr(cifar, part, known)
    names = [f"class {n}" for n in range(10)]
    md5 = write(cifar.meta["filename"], dict(label_names=names))
    monkeypatch.setattr(cifar, "meta", cifar.meta | dict(md5=md5))

    full = dataclasses.replace(run, profile="full")
    for dataset, parts in zip(utils.load_cifar10(full), (written[:5], written[5:]), strict=True):
        assert dataset.source == "full" and list(dataset.classes) == names
        assert np.array_equal(dataset.images, np.concatenate([pixels for pixels, _ in parts]))
        assert dataset.labels.tolist() == [label for _, labels in parts for label in labels]
