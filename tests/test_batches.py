"""A batch holds what torchvision would have made of the same images, in a known order."""

import dataclasses

import pytest
import torch
from torchvision.transforms import v2

import utils


def numbered(n=50, channels=3, size=8, maps=False, width=None):
    """Random images whose labels, or the first pixels of whose label maps, tell them apart."""
    width = width or size
    images = torch.randint(256, (n, channels, size, width), dtype=torch.uint8)
    labels = torch.arange(n)
    if maps:
        labels = torch.randint(n, (n, size, width))
    return utils.Dataset("numbered", "sample", images, labels, tuple(map(str, range(n))))


def test_every_example_comes_once_an_epoch(run):
    batches = utils.Batches(numbered(50), 16, run, shuffle=True)
    sizes = [len(labels) for _, labels in batches]
    assert sizes == [16, 16, 16, 2] and len(batches) == 4
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(50))


@pytest.mark.parametrize("maps", [False, True])
def test_batches_of_one_data_set_share_its_copy_on_the_device(run, maps):
    dataset = numbered(maps=maps)
    one, other = utils.Batches(dataset, 16, run), utils.Batches(dataset, 8, run, shuffle=True)
    assert one.pixels is other.pixels and one.labels is other.labels
    part = utils.Batches(dataset.subset(torch.arange(20)), 8, run)
    assert len(part.pixels) == 20 and torch.equal(part.pixels, one.pixels[:20])


def test_the_order_comes_from_seed_and_epoch_alone(run):
    def order(seed, epoch):
        batches = utils.Batches(dataset, 16, run, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        torch.rand(3)  # whatever else was drawn
        return torch.cat([labels for _, labels in batches]).tolist()

    dataset = numbered()
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4


def test_images_are_normalised_as_torchvision_does(run):
    dataset = numbered()
    mean, std = dataset.statistics()
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images = torch.cat([images for images, _ in utils.Batches(dataset, 16, run)])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, reference(dataset.images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_images_can_be_looked_at(run, channels):
    dataset = numbered(20, channels)
    even = torch.cat([dataset.images, torch.full((1, channels, 8, 8), 9, dtype=torch.uint8)])
    for data in (dataset, dataclasses.replace(dataset, images=even[-1:].expand(20, -1, -1, -1))):
        batches = utils.Batches(data, 20, run)
        images, _ = next(iter(batches))
        assert torch.equal(batches.pixels_of(images), data.images)
    smaller = batches.pixels_of(images[..., :5, :5])  # as recipes.Resized makes them
    assert smaller.shape == (20, channels, 5, 5) and (smaller == 9).all()
    assert batches.pixels_of(1e6 * torch.ones(1, channels, 1, 1)).unique().tolist() == [255]


def test_batches_are_channels_last(run):
    for flip in (False, True):
        images, _ = next(iter(utils.Batches(numbered(), 16, run, flip=flip)))
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize("maps", [False, True])
def test_each_image_moves_with_its_label_map(run, maps, width):
    """Every augmented image is its original, flipped or not and moved, border reflected."""
    dataset = numbered(40, maps=maps, width=width)
    statistics = [0.0] * 3, [1 / 255] * 3  # so that pixels come out as they went in
    batches = utils.Batches(dataset, 16, run, statistics, shuffle=True, flip=True, shift=2)
    padded = torch.nn.functional.pad(dataset.images.float(), (2, 2, 2, 2), mode="reflect")
    padded_labels = dataset.labels
    if maps:
        padded_labels = torch.nn.functional.pad(dataset.labels.float(), (2,) * 4, mode="reflect")
    seen = set()
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            found = []
            for flip in (False, True):
                straight = image.flip(2) if flip else image
                for y in range(5):
                    for x in range(5):
                        window = padded[:, :, y : y + 8, x : x + width]
                        match = (window - straight).abs().amax((1, 2, 3)) < 0.01
                        found += [(int(i), flip, y, x) for i in match.nonzero()[:, 0]]
            assert len(found) == 1
            index, flip, y, x = found[0]
            expected = padded_labels[index]
            if maps:
                expected = expected[y : y + 8, x : x + width].long()
                expected = expected.flip(1) if flip else expected
            assert torch.equal(label, expected)
            seen.add(found[0])
    assert {index for index, *_ in seen} == set(range(40))
    assert {flip for _, flip, *_ in seen} == {False, True}
    assert {y for *_, y, _ in seen} == {x for *_, x in seen} == set(range(5))


def test_half_of_the_images_are_flipped_and_every_move_is_as_likely(run):
    images = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 5, 4] = 255
    dots = utils.Dataset("dots", "sample", images, torch.arange(2000) % 2, ("a", "b"))
    batches = utils.Batches(dots, 500, run, ([0.0], [1.0]), flip=True, shift=2)
    place = torch.cat([images for images, _ in batches]).flatten(1).argmax(1)
    down, across = place // 16 - 5, place % 16
    flipped = across > 8
    assert 0.45 < flipped.double().mean() < 0.55
    across = torch.where(flipped, 15 - across, across) - 4
    counts = torch.bincount((down + 2) * 5 + across + 2, minlength=25)  # 80 each, give or take 9
    assert len(counts) == 25 and 45 < counts.min() and counts.max() < 115


def test_an_even_image_is_normalised_to_nothing(run):
    even = dataclasses.replace(numbered(), images=torch.full((50, 3, 8, 8), 7, dtype=torch.uint8))
    images, _ = next(iter(utils.Batches(even, 16, run)))
    torch.testing.assert_close(images, torch.zeros_like(images))


def test_augmentation_comes_from_seed_and_epoch_alone(run):
    def images(seed, epoch):
        batches = utils.Batches(dataset, 50, run, flip=True, shift=2, seed=seed)
        batches.set_epoch(epoch)
        return next(iter(batches))[0]

    dataset = numbered()
    first = images(0, 1)
    assert torch.equal(first, images(0, 1))
    assert not torch.equal(first, images(0, 2)) and not torch.equal(first, images(1, 1))


def test_an_impossible_batch_size_or_shift_is_refused(run):
    with pytest.raises(utils.UsageError, match="batch_size is 0"):
        utils.Batches(numbered(), 0, run)
    with pytest.raises(utils.UsageError, match="shift is 8"):
        utils.Batches(numbered(size=8), 4, run, shift=8)
