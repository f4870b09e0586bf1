"""The parts of the best models' recipes: Muon, images that grow or are warped, several views."""

import copy
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import recipes
import report
import settings
import trials
import utils
from conftest import train_giving


@pytest.fixture
def pictures():
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return utils.Dataset("noise", "sample", images, torch.arange(40) % 10, utils.DIGITS)


def test_orthogonal_keeps_the_directions_and_evens_their_lengths():
    u, _, v = torch.linalg.svd(torch.randn(24, 60), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1, 5, 24)) @ v
    for m, ideal in ((matrix, u @ v), (matrix.T, (u @ v).T)):
        result = recipes.orthogonal(m).float()
        assert result.shape == m.shape
        values = torch.linalg.svdvals(result)
        assert 0.4 < values.min() and values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(result, ideal, dim=1).min() > 0.9


def test_orthogonal_is_three_steps_of_the_polynomial():
    matrix = torch.randn(24, 60, generator=utils.generator(0))
    x = matrix.double() / matrix.norm()
    for _ in range(3):  # one after the other, on the whole matrix
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    for m, steps in ((matrix, x), (matrix.T, x.T)):
        assert (recipes.orthogonal(m) - steps).norm() / steps.norm() < 0.03  # bfloat16's rounding


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])  # whose squares leave float16's range
def test_orthogonal_in_float16(monkeypatch, size):
    matrix = size * torch.randn(24, 60, generator=utils.generator(0))
    exact = recipes.orthogonal(matrix, scale=0.1).float()
    monkeypatch.setattr(recipes, "best_precision", lambda device: torch.float16)
    for m, ideal in ((matrix, exact), (matrix.T, exact.T)):
        half = recipes.orthogonal(m, scale=0.1)
        assert half.dtype == torch.float16
        assert (half.float() - ideal).norm() < 0.03 * ideal.norm()  # where bfloat16 is the other
    stack = recipes.orthogonal(torch.stack([matrix, torch.zeros_like(matrix)]), scale=0.1)
    assert (stack[0].float() - exact).norm() < 0.03 * exact.norm() and not stack[1].any()


def test_orthogonal_of_nothing_is_nothing():
    assert not recipes.orthogonal(torch.zeros(3, 4)).any()  # NaN would be something


def test_muon_steps_filters_by_an_orthogonal_matrix_and_the_rest_by_adamw(classification):
    torch.manual_seed(0)
    model = classification.FastNet((8, 8, 8))
    before = copy.deepcopy(model)
    optimizer = recipes.Muon(model, lr=0.1, adamw_lr=5e-3)
    filters = {id(p) for p in optimizer.filters}
    named = {n: p for n, p in model.named_parameters() if id(p) in filters}
    assert len(named) == 6 and all(p.ndim == 4 for p in named.values())
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    old = dict(before.named_parameters())
    for name, p in model.named_parameters():
        if name in named:
            start = old[name] * len(p) ** 0.5 / old[name].norm()
            step = torch.linalg.svdvals((p - start).flatten(1).detach())
            assert 0.05 < step.max() < 0.13  # filters times the largest singular value
        elif p.requires_grad:
            assert 0 < (p - old[name]).abs().max() <= 5e-3 * 1.01
        else:
            assert torch.equal(p, old[name])


def test_muon_steps_by_the_averaged_gradient():
    """Three steps by the formula: m a + g averages, Nesterov's look ahead, a norm of 1."""
    draws = utils.generator(0)
    layer = nn.Conv2d(3, 4, 3, bias=False)
    optimizer = recipes.Muon(layer, lr=0.1, momentum=0.8)
    expected, average = layer.weight.detach().clone(), torch.zeros(4, 3, 3, 3)
    for _ in range(3):
        gradient = torch.randn(4, 3, 3, 3, generator=draws)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        average = 0.8 * average + gradient
        ahead = (gradient + 0.8 * average).permute(0, 2, 3, 1)
        step = 0.1 * recipes.orthogonal(ahead.flatten(1)).float()
        expected *= 4**0.5 / expected.norm()
        expected -= step.view(4, 3, 3, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0.01, atol=2e-3)


def test_muon_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    rest = copy.deepcopy(model[1:])
    muon = recipes.Muon(model, adamw_lr=0.01)
    adamw = torch.optim.AdamW(rest.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        for weight, same in zip(model[1:].parameters(), rest.parameters(), strict=True):
            same.grad = weight.grad.clone()
        muon.step()
        adamw.step()
    for weight, same in zip(model[1:].parameters(), rest.parameters(), strict=True):
        assert torch.equal(weight, same)  # the last filters have a bias: their scale counts


def test_the_rates_fall_in_a_line_to_nothing():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1))
    optimizer = recipes.Muon(model, lr=0.1, adamw_lr=0.02)
    schedule, rates = recipes.linear_decay(optimizer, range(10), epochs=3), []
    for _ in range(31):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for peak, seen in zip((0.1, 0.02), zip(*rates, strict=True), strict=True):
        assert seen == pytest.approx([peak * (30 - step) / 30 for step in range(31)], abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 2), (3, 3), (4, 4)])
def test_a_convolution_of_small_maps_is_a_convolution(shape):
    torch.manual_seed(0)
    ours, images = recipes.Conv3x3(5, 7), torch.randn(6, 5, *shape)
    plain = nn.Conv2d(5, 7, 3, padding=1, bias=False)
    plain.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, plain):
        x = images.clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    costs = [report.multiply_adds(layer, (5, *shape)) for layer in (ours, plain)]
    assert costs[0] == costs[1] == 5 * 7 * 9 * shape[0] * shape[1]


def test_muon_goes_on_from_its_state_to_the_same_bits(classification):
    def run(optimizer, model, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 16, 16)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = classification.FastNet((8, 8, 8))
    optimizer = recipes.Muon(model)
    run(optimizer, model, (1, 2))
    again = copy.deepcopy(model)
    resumed = recipes.Muon(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, model, (3, 4))
    run(resumed, again, (3, 4))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def scenes():
    """Of bars, each of its own length, on backgrounds; number n is of the grey level n all over."""
    levels = torch.arange(40, dtype=torch.uint8)
    images = levels[:, None, None, None].repeat(1, 3, 32, 32)
    backgrounds = utils.Dataset("greys", "sample", images, torch.arange(40) % 10, utils.DIGITS)
    ink = torch.zeros(60, 1, 28, 28, dtype=torch.uint8)
    for number in range(60):  # a bar of full ink of its own length, and one end that is no mirror's
        ink[number, 0, 4, 4 : 10 + number // 4] = 255
        ink[number, 0, 5 : 6 + number % 4, 4] = 255
    digits = utils.Dataset("bars", "sample", ink, torch.arange(60) % 10, utils.DIGITS)
    return utils.compose_scenes(digits, backgrounds, seed=3)


def bars(batches):
    """[(background, digit, top, left, colour)] of every scene, whose label map is checked."""
    digits, backgrounds = batches.dataset.layers
    found, shapes = [], {}
    for number, ink in enumerate(digits.images[:, 0] > 127):
        shapes[tuple(ink.nonzero()[0].tolist()), bars_key(ink)] = number
    for images, maps in batches:
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (batches.mean, batches.std))
        for image, labels in zip((images * std + mean) * 255, maps, strict=True):
            inked = labels < 10
            y, x = inked.nonzero().amin(0).tolist()
            number = shapes[(4, 4), bars_key(inked)]
            level = image[:, ~inked].mean().round().int().item()
            assert (image[:, ~inked] - level).abs().max() < 0.1
            assert (image[:, inked] - image[:, y, x][:, None]).abs().max() < 0.1
            assert labels[inked].unique().tolist() == [digits.labels[number].item()]
            assert labels[~inked].unique().tolist() == [10 + backgrounds.labels[level].item()]
            found.append((level, number, y - 4, x - 4, tuple(image[:, y, x].round().tolist())))
    return found


def bars_key(ink):
    """How many pixels are in the first row and in the first column of the ink."""
    y, x = ink.nonzero().amin(0).tolist()
    return int(ink[y].sum()), int(ink[:, x].sum())


def test_the_layers_are_in_the_order_of_the_scenes(scenes):
    digits, _ = scenes.layers
    assert len(digits) == len(scenes) == 40
    for labels, ink, number in zip(scenes.labels, digits.images, digits.labels, strict=True):
        assert bars_key(labels < 10) == bars_key(ink[0] > 127)
        assert labels.min() == number


def test_the_layers_are_those_that_the_scenes_are_made_of(run):
    """Also after the split: no digit or background of the validation scenes is trained on."""
    scenes = utils.split(utils.load_scenes(run)[0], 0.2, seed=0)[0]
    digits, backgrounds = scenes.layers
    labels, ink = scenes.labels.flatten(1).long(), digits.images[:, 0] > 127
    assert torch.equal(labels.amin(1), digits.labels)
    assert torch.equal((labels < 10).sum(1), ink.sum((1, 2)))
    assert torch.equal(labels.amax(1) - 10, backgrounds.labels)
    untouched = (scenes.images == backgrounds.images).all(1).float().mean((1, 2))
    assert untouched.min() > 0.3


def test_composed_scenes_are_new_in_every_epoch_and_repeatable(scenes, run):
    batches = recipes.Composed(scenes, 7, run, shuffle=True, flip=True, shift=2)
    assert [len(labels) for _, labels in batches] == [7] * 5 + [5]
    batches.set_epoch(1)
    first, again = bars(batches), bars(batches)
    batches.set_epoch(2)
    second = bars(batches)
    assert first == again
    for epoch in (first, second):  # all of them, each once
        assert sorted(scene[0] for scene in epoch) == sorted(scene[1] for scene in epoch)
        assert sorted(scene[0] for scene in epoch) == list(range(40))
        assert {scene[2] for scene in epoch} == set(range(5)) == {scene[3] for scene in epoch}
    for part in (slice(0, 1), slice(0, 2), slice(4, 5)):  # order, pairs and colours differ
        assert [scene[part] for scene in first] != [scene[part] for scene in second]
    pairs = {scene[:2] for scene in first} & {scene[:2] for scene in second}
    assert len(pairs) < 10
    batches.set_epoch(1)
    batches.seed = 1
    assert bars(batches) != first


def test_composed_backgrounds_are_flipped_and_moved_as_in_plain_batches(scenes, run, pictures):
    digits, levels = scenes.layers[0], ([0.0] * 3, [1.0] * 3)
    no_ink = replace(digits, images=torch.zeros_like(digits.images))
    scenes = replace(scenes, layers=(no_ink, pictures))
    options = dict(shuffle=True, flip=True, shift=2, seed=5)
    composed = recipes.Composed(scenes, 7, run, levels, **options)
    plain = utils.Batches(pictures, 7, run, levels, **options)
    for (images, _), (same, _) in zip(composed, plain, strict=True):
        torch.testing.assert_close(images, same)


def test_a_digit_at_the_edge_of_its_image_is_whole_and_there_once(scenes, run):
    digits, backgrounds = scenes.layers
    ink = torch.zeros_like(digits.images)
    ink[:, :, -1], ink[:, :, :, 0] = 255, 255
    scenes = replace(scenes, layers=(replace(digits, images=ink), backgrounds))
    _, maps = next(iter(recipes.Composed(scenes, 40, run, shuffle=True)))
    assert ((maps < 10).sum((1, 2)) == 55).all()
    assert ((maps < 10).sum(2).amax(1) == 28).all() and ((maps < 10).sum(1).amax(1) == 28).all()


def test_composed_scenes_look_like_the_scenes(run):
    """On the sample: the same share of inked pixels, and the same brightness."""
    scenes = utils.load_scenes(run)[0]
    composed = recipes.Composed(scenes, 500, run)
    images, labels = (torch.cat(part) for part in zip(*composed, strict=True))
    fixed = torch.cat([images for images, _ in utils.Batches(scenes, 500, run)])
    ink, fixed_ink = ((x < 10).float().mean() for x in (labels, scenes.labels))
    assert abs(ink - fixed_ink) < 0.003 and labels.max() == 19
    assert (images.mean((0, 2, 3)) - fixed.mean((0, 2, 3))).abs().max() < 0.02
    assert (images.std((0, 2, 3)) - fixed.std((0, 2, 3))).abs().max() < 0.02


def test_a_checkpoint_knows_what_scenes_are_composed_of(scenes, run):
    digits, backgrounds = scenes.layers
    brighter = replace(backgrounds, images=backgrounds.images.clamp(min=9))
    others = digits.subset(torch.arange(39, -1, -1))
    same = digits, backgrounds
    given = same, same, (digits, brighter), (others, backgrounds)
    texts = [str(recipes.Composed(replace(scenes, layers=both), 7, run)) for both in given]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_composed_scenes_need_layers_that_fit(scenes, run):
    digits, backgrounds = scenes.layers
    with pytest.raises(utils.UsageError, match="layers must be a digit and a background for each"):
        replace(scenes, layers=(digits.subset(torch.arange(39)), backgrounds))
    with pytest.raises(utils.UsageError, match="greys: scenes without layers can't be made anew"):
        recipes.Composed(backgrounds, 7, run)
    odd = replace(digits, images=digits.images[..., 1:, 1:])
    wide = replace(backgrounds, images=backgrounds.images[..., 2:, :])
    for layers in ((odd, backgrounds), (digits, wide)):
        composed = utils.compose_scenes(*layers, seed=0)
        with pytest.raises(utils.UsageError, match="backgrounds must be square, and wider .* even"):
            recipes.Composed(composed, 7, run)
    with pytest.raises(utils.UsageError, match="the scenes are of another size than their layers"):
        recipes.Composed(replace(scenes, layers=(digits, wide)), 7, run)


def test_composed_scenes_take_statistics_as_plain_batches_do(scenes, run):
    given = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    by_name = recipes.Composed(scenes, 7, run, statistics=given)
    by_place = recipes.Composed(scenes, 7, run, given)
    assert (by_name.mean, by_name.std) == (by_place.mean, by_place.std) == given


def test_muon_moves_filters_that_start_at_zero():
    layer = nn.Conv2d(2, 4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = recipes.Muon(layer, lr=0.1)
    layer(torch.randn(3, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert layer.weight.isfinite().all() and layer.weight.abs().max() > 0


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv2d(1, 2, 3)])
def test_muon_needs_filters(layer):
    with pytest.raises(utils.UsageError, match=f"{layer._get_name()} has no convolution without a"):
        recipes.Muon(layer)


class Cut(recipes.Resized):
    """Batches at whose third epoch somebody presses Ctrl-C."""

    def set_epoch(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        super().set_epoch(epoch)


def test_a_run_with_muon_and_growing_images_goes_on_to_the_same_bits(run, pictures, classification):
    def trained(name, batches_of=recipes.Resized):
        torch.manual_seed(0)
        model = classification.FastNet((8, 8, 8))
        batches = batches_of(pictures, 10, run, shuffle=True, sizes=(16, 24, 32))
        optimizer, validation = recipes.Muon(model), utils.Batches(pictures, 20, run)
        schedule, checkpoint = recipes.linear_decay(optimizer, batches, 3), run.checkpoint(name)
        history = utils.train(
            model, optimizer, batches, validation, 3, run, schedule, checkpoint=checkpoint
        )
        return history, list(model.parameters())

    _, whole = trained("whole")
    assert len(trained("cut", Cut)[0]) == 2
    history, resumed = trained("cut")
    assert history.loaded == 2 and len(history) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_images_grow_to_their_full_size():
    for epochs in range(1, 40):
        sizes = recipes.progressive_sizes(epochs)
        assert len(sizes) == epochs and sizes[-1] == 32 and sizes == sorted(sizes)
    assert recipes.progressive_sizes(12) == [20] * 4 + [24] * 4 + [28] * 2 + [32] * 2


def test_resized_batches_are_the_same_images_made_small(run, pictures):
    plain = utils.Batches(pictures, 10, run, shuffle=True, seed=3)
    resized = recipes.Resized(pictures, 10, run, shuffle=True, seed=3, sizes=(16, 32))
    for epoch, side in ((1, 16), (2, 32), (3, 32)):
        plain.set_epoch(epoch)
        resized.set_epoch(epoch)
        for (images, labels), (small, same) in zip(plain, resized, strict=True):
            assert small.shape == (10, 3, side, side) and torch.equal(labels, same)
            wanted = v2.functional.resize(images, [side, side], antialias=True)
            torch.testing.assert_close(small, wanted, atol=1e-4, rtol=1e-4)
    assert "sizes (16, 32)" in str(resized)
    one, two = (report.training_flops(nn.Conv2d(3, 4, 1), resized, n) for n in (1, 2))
    assert one == 6 * 40 * 16 * 16 * 12 and two == one + 6 * 40 * 32 * 32 * 12


def test_flips_alternate(run):
    """Every image is mirrored in one of two epochs in a row, and not all in the same one."""
    images = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = torch.arange(1, 61, dtype=torch.uint8)[:, None, None]  # on the left
    marks = utils.Dataset("marks", "sample", images, torch.arange(60) % 2, ("a", "b"))
    options = dict(shuffle=True, flip=True, sizes=(4,))

    def mirrored(epoch, **more):
        batches = recipes.Resized(marks, 25, run, ([0.0], [1.0]), **options | more)
        batches.set_epoch(epoch)
        pixels = (255 * torch.cat([images for images, _ in batches])).round()
        assert sorted(pixels.amax((1, 2, 3)).tolist()) == list(range(1, 61))
        return set(pixels[pixels[:, 0, 0, 3] > 0].amax((1, 2, 3)).tolist())

    one, two, three = (mirrored(epoch) for epoch in (1, 2, 3))
    assert one == three and one | two == set(range(1, 61)) and not one & two
    assert 15 < len(one) < 45 and one != mirrored(1, seed=1)
    assert not mirrored(1, flip=False) | mirrored(2, flip=False)
    drawn = [mirrored(epoch, alternate=False) for epoch in (1, 2)]
    assert drawn[0] & drawn[1] and drawn[0] | drawn[1] != set(range(1, 61))


def test_warped_batches_without_a_warp_are_plain_ones(run, pictures):
    plain = utils.Batches(pictures, 10, run, shuffle=True)
    still = recipes.Warped(pictures, 10, run, shuffle=True, degrees=0, stretch=0, move=0)
    for (images, labels), (same, known) in zip(plain, still, strict=True):
        torch.testing.assert_close(same, images, atol=1e-4, rtol=1e-4)
        assert torch.equal(labels, known)


def test_only_square_images_with_one_label_are_warped_or_resized(run, scenes, pictures):
    wide = replace(pictures, images=pictures.images[:, :, :16])
    warp = dict(degrees=10, stretch=0.1, move=2)
    for data in (wide, scenes):
        with pytest.raises(utils.UsageError, match="only square images with one label are warped"):
            recipes.Warped(data, 10, run, **warp)
    for data, sizes in ((scenes, [20]), (pictures, [])):
        with pytest.raises(utils.UsageError, match="give a size, and images with one label each"):
            recipes.Resized(data, 10, run, sizes=sizes)


def test_a_warp_is_made_of_what_its_name_says_within_its_bounds(run, monkeypatch):
    """The maps taken apart again: angle, slant, stretch of both sides, moves."""
    images = torch.zeros(5000, 1, 8, 8, dtype=torch.uint8)
    blank = utils.Dataset("blank", "sample", images, torch.arange(5000) % 2, ("a", "b"))
    maps, grid = [], torch.nn.functional.affine_grid
    monkeypatch.setattr(
        recipes.F, "affine_grid", lambda m, *a, **o: maps.append(m) or grid(m, *a, **o)
    )
    list(recipes.Warped(blank, 500, run, ([0.0], [1.0]), degrees=12, stretch=0.1, move=2))
    a, b, across, c, d, down = torch.cat(maps).flatten(1).T
    angle, wide = torch.atan2(c, d), a / torch.atan2(c, d).cos()
    radians = 12 * torch.pi / 180
    parts = {
        "angle": (angle, radians),
        "slant": (b + wide * angle.sin(), radians),
        "wide": (wide - 1, 0.1),
        "high": (torch.hypot(c, d) - 1, 0.1),
        "across": (across, 2 * 2 / 8),
        "down": (down, 2 * 2 / 8),
    }
    for name, (part, bound) in parts.items():
        assert 0.99 * bound < part.abs().max() < 1.0001 * bound, name
        assert part.mean().abs() < 0.05 * bound, name


def test_a_warp_moves_by_pixels_and_turns_by_degrees(run):
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 10:18, 13:15] = 255  # a bar, upright
    bars = utils.Dataset(
        "bars", "sample", image.repeat(200, 1, 1, 1), torch.arange(200) % 2, ("a", "b")
    )
    where = torch.arange(28.0)

    def middles(**warp):
        options = {**dict(degrees=0, stretch=0, move=0), **warp}
        batches = recipes.Warped(bars, 200, run, ([0.0], [1.0]), **options)
        ink = next(iter(batches))[0][:, 0]
        return (ink.sum(1) @ where) / ink.sum((1, 2)), ink

    across, _ = middles(move=2.5)
    assert 15.5 < across.max() < 16.1 and 10.9 < across.min() < 11.5  # from 13.5
    upright, ink = middles(degrees=12)
    assert (upright - 13.5).abs().max() < 0.2
    rows = ink[:, [11, 16]]
    top, bottom = ((rows @ where) / rows.sum(2)).T
    assert 1 < (top - bottom).abs().max() < 5 * 0.46  # it leans, by tan(12) and 12 degrees slant
    even, levels = replace(bars, images=torch.full_like(bars.images, 80)), ([0.1], [0.3])
    warped = recipes.Warped(even, 200, run, levels, degrees=12, stretch=0.1, move=9)
    level = torch.tensor((80 / 255 - 0.1) / 0.3)  # whatever came in over the border
    torch.testing.assert_close(*torch.broadcast_tensors(next(iter(warped))[0], level))
    batches = recipes.Warped(bars, 200, run, degrees=12, stretch=0.1, move=2, seed=1)
    first = next(iter(batches))[0]
    batches.set_epoch(1)
    assert not torch.equal(first, next(iter(batches))[0])
    batches.set_epoch(0)
    assert torch.equal(first, next(iter(batches))[0])


def test_views_are_averaged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval()
    images = torch.randn(2, 3, 32, 32)
    wide = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = wide[..., :32, :32], wide[..., 2:, 2:]
    plain = 0.5 * model(images) + 0.25 * model(moved[0]) + 0.25 * model(moved[1])
    torch.testing.assert_close(recipes.Views(model, mirror=False)(images), plain)
    mirrored = 0.5 * model(images.flip(-1)) + 0.25 * sum(model(view.flip(-1)) for view in moved)
    torch.testing.assert_close(recipes.Views(model)(images), (plain + mirrored) / 2)


def test_whitening_evens_out_the_patches(classification):
    images = nn.functional.avg_pool2d(torch.randn(20, 3, 64, 64), 2)
    model = classification.FastNet((8, 8, 8)).init_whitening(images)
    first = model.whiten(images)[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(first @ first.T / first.shape[1], torch.eye(12), atol=0.02, rtol=0)
    assert torch.equal(model.whiten.weight[12:], -model.whiten.weight[:12])
    assert not model.whiten.weight.requires_grad


@pytest.mark.parametrize("side", [16, 20, 24, 28, 32])
def test_the_best_models_take_images_of_several_sizes(side, classification, segmentation):
    for shape in classification.SHAPES.values():
        model = classification.FastNet(tuple(w // 8 for w in shape[0]), shape[1], classes=7).eval()
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)
    if side % 8 == 0:
        assert segmentation.SkipNet(4, 5).eval()(torch.zeros(2, 3, side, side)).shape[1:] == (
            5,
            side,
            side,
        )
    assert classification.DigitNet(4).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_trials_keep_what_they_found(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    quick = replace(run, quiet=True)
    batches = utils.Batches(pictures, 20, quick, shuffle=True)

    def make():
        convolution = nn.Conv2d(3, 4, 3, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))

    variants = {
        "AdamW": trials.Variant(make, batches, 1e-3),
        "constant": trials.Variant(make, batches, 1e-3, schedule="constant"),
        "Muon": trials.Variant(make, batches, 0.1, muon=True, smoothing=0.1, views=recipes.Views),
    }
    text = trials.compare("what?", variants, utils.Batches(pictures, 20, quick), 2, quick)
    assert "On record" not in text and text.splitlines()[1].startswith("AdamW")
    rows = trials.load(quick.figures)
    assert [row["variant"] for row in rows] == list(variants)
    assert {len(row["seeds"]) for row in rows} == {2} and batches.seed == 0
    torch.manual_seed(1)
    model, batches.seed = make().to(memory_format=torch.channels_last), 1
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
    schedule = utils.one_cycle(optimizer, batches, 2, 1e-3)
    one = utils.train(
        model, optimizer, batches, utils.Batches(pictures, 20, quick), 2, quick, schedule
    )
    alone = trials.compare("one?", variants, batches, 2, quick, seeds=(1, 1))
    assert f"{one[-1].validation_accuracy:.2f}    0.00" in alone.splitlines()[1]
    keep = partial(report.keep, file="trials.json", key="question")
    keep([{**rows[0], "question": "else?"}], quick.figures)
    keep(rows[:1], quick.figures)
    keep([{**rows[0], "epochs": 1}], quick.figures)  # gives way to nothing longer
    kept = trials.load(quick.figures)
    assert [(row["question"], row["epochs"]) for row in kept if row["question"] != "one?"] == [
        ("else?", 2),
        ("what?", 2),
    ]
    keep(rows, tmp_path / "figures")
    text = trials.compare("what?", variants, utils.Batches(pictures, 20, quick), 2, quick)
    assert "On record, of the full data:" in text
    short = replace(quick, profile="short")  # shows the record, and trains nothing
    text = trials.compare("what?", variants, utils.Batches(pictures, 20, quick), 99, short)
    assert text.startswith("Not run in the short profile") and "2 seeds each, 2 ep" in text


def test_the_dice_loss_is_of_overlaps_and_leaves_out_what_is_ignored():
    labels = torch.tensor([[[0, 0, 1, utils.IGNORE]], [[1, 1, 1, 0]]])
    scores = torch.zeros(2, 3, 1, 4)  # each of three classes has a third of every pixel
    plain = nn.functional.cross_entropy(scores, labels, ignore_index=utils.IGNORE)
    loss = recipes.with_dice(scores, labels, utils.IGNORE)
    # of the batch, not of each image: seven pixels, three and four; the third class is nowhere
    overlaps = (2 * (3 / 3) / (7 / 3 + 3) + 2 * (4 / 3) / (7 / 3 + 4) + 0) / 3
    assert (loss - plain).item() == pytest.approx(1 - overlaps, rel=1e-6)
    sure = 40.0 * nn.functional.one_hot(labels[..., :3], 3).permute(0, 3, 1, 2)
    perfect = recipes.with_dice(sure, labels[..., :3], utils.IGNORE)
    assert perfect.item() == pytest.approx(1 / 3, rel=1e-6)  # that class again
    scores[0, ..., 3] = torch.tensor([9.0, -9.0, 0.0])[:, None]  # of the ignored pixel: no matter
    assert recipes.with_dice(scores, labels, utils.IGNORE) == loss


def test_a_variants_rate_falls_goes_through_one_cycle_or_stays(run, pictures):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    plain = trials.Variant(None, utils.Batches(pictures, 20, run), 0.1)
    rates = {}
    for muon in (False, True):
        for kind in (None, "cycle", "line"):
            variant = replace(plain, muon=muon, schedule=kind)
            optimizer, _ = trials._optimizer(model, variant, 2)
            rates[muon, kind] = optimizer.param_groups[0]["lr"]
            assert isinstance(optimizer, recipes.Muon) == muon
            if muon:  # the rest has a rate of its own
                first = 5e-3 / 25 if kind == "cycle" else 5e-3
                assert optimizer.param_groups[1]["lr"] == pytest.approx(first)
    cycle, line = 0.1 / 25, 0.1
    assert list(rates.values()) == pytest.approx([cycle, cycle, line, line, cycle, line])
    assert trials._optimizer(model, replace(plain, schedule="constant"), 2)[1] is None


def test_a_variant_says_what_is_scored(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    quick, scored = replace(run, quiet=True), []

    class Spied(recipes.Views):
        def forward(self, images):
            scored.append(self.mirror)
            return super().forward(images)

    batches = utils.Batches(pictures, 20, quick, shuffle=True)
    make = partial(nn.Sequential, nn.Flatten(), nn.Linear(3072, 10))
    for views in (None, partial(Spied, mirror=False), Spied):
        variant = trials.Variant(make, batches, 1e-3, views=views)
        trials.compare("views?", {"one": variant}, batches, 1, quick, seeds=(0, 1))
    assert scored == [False] * 4 + [True] * 4  # two batches and two seeds


def test_a_row_of_a_question_is_what_its_runs_had(run, pictures, monkeypatch):
    runs = iter([("a CPU", (50.0, 60.0, 64.0, 70.0)), ("a GPU", (50.0, 60.0, 70.0, 74.0))])

    def train(*arguments):
        device, scores = next(runs)
        epochs = [(n, 2.0, 1.0, 50.0, score, 0.5) for n, score in enumerate(scores, start=1)]
        return utils.History(epochs, dict(device=device))

    monkeypatch.setattr(utils, "train", train)
    batches = utils.Batches(pictures, 20, run)
    unnamed = partial(nn.functional.cross_entropy, reduction="mean")
    variant = trials.Variant(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), batches, 1e-3, loss=unnamed
    )
    row = trials._row("what?", "one", variant, batches, 4, run, (0, 1), None)
    assert (row["mean"], row["seconds"]) == (72, 8) and row["recipe"].endswith(", partial")
    assert row["spread"] == pytest.approx(8**0.5)  # 70 and 74, each 2 from the mean, over n - 1
    assert row["jitter"] == pytest.approx((4 + 6 + 10 + 4) / 4)  # from the second epoch on
    line = trials.table([row, {**row, "device": "another"}]).splitlines()[-1]
    assert line.endswith("; float32; a CPU, a GPU, another")


def test_a_variant_may_have_a_loss_of_its_own(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    quick = replace(run, quiet=True)
    batches, asked = utils.Batches(pictures, 20, quick, shuffle=True), []

    def upside_down(scores, labels, ignore_index):
        asked.append(ignore_index)
        return -nn.functional.cross_entropy(scores, labels, ignore_index=ignore_index)

    plain = trials.Variant(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), batches, 1e-2)
    variants = {"plain": plain, "worse": replace(plain, loss=upside_down)}
    trials.compare("loss?", variants, batches, 4, quick, seeds=(0, 1))
    plain, worse = trials.load(quick.figures)
    assert worse["mean"] < plain["mean"] and set(asked) == {utils.IGNORE}
    assert worse["recipe"] == plain["recipe"] + ", upside_down"
    with pytest.raises(utils.UsageError, match="loss[?]: one seed has no spread"):
        trials.compare("loss?", variants, batches, 4, quick, seeds=(0,))


def test_a_variants_smoothing_reaches_its_loss(run, pictures, monkeypatch):
    seen, history = [], utils.History([(1, 1, 1, 1, 1, 1)], dict(device="a CPU"))
    monkeypatch.setattr(utils, "train", train_giving(history, seen))
    batches = utils.Batches(pictures, 20, run)
    make = partial(nn.Sequential, nn.Flatten(), nn.Linear(3072, 10))
    variant = trials.Variant(make, batches, 1e-3, smoothing=0.2)
    trials._row("what?", "one", variant, batches, 1, run, (0, 1), None)
    scores, labels = torch.randn(5, 10), torch.arange(5)
    smoothed = nn.functional.cross_entropy(scores, labels, label_smoothing=0.2)
    assert [given["loss_function"](scores, labels) for given in seen] == [smoothed] * 2


def test_trials_that_were_stopped_are_no_record(run, pictures):
    batches = Cut(pictures, 20, run, shuffle=True, sizes=(32, 32, 32, 32))
    variants = {
        "cut": trials.Variant(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), batches, 1e-3
        )
    }
    with pytest.raises(KeyboardInterrupt, match="cut: stopped after 2 of 4 epochs"):
        trials.compare("cut?", variants, utils.Batches(pictures, 20, run), 4, run)


def test_trials_that_were_stopped_go_on_in_the_full_profile(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    monkeypatch.setattr(trials, "asked", {"cut?"})
    full, seen = replace(run, profile="full", quiet=True), []

    class Seen(recipes.Resized):
        def set_epoch(self, epoch):
            seen.append(epoch)
            super().set_epoch(epoch)

    def ask(kind, run):
        batches = kind(pictures, 20, run, shuffle=True, sizes=(32, 32, 32, 32))
        layers = partial(nn.Sequential, nn.Flatten())
        variants = {"1, all": trials.Variant(lambda: layers(nn.Linear(3072, 10)), batches, 1e-3)}
        validation = utils.Batches(pictures, 20, run)
        trials.compare("cut?", variants, validation, 4, run, seeds=[0, 1])
        return [row["mean"] for row in trials.load(tmp_path / "figures")]

    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 4 epochs"):
        ask(Cut, full)
    ask(recipes.Resized, run)  # the quick profile's answer leaves that alone
    resumed = ask(Seen, full)
    assert seen == [3, 4, 1, 2, 3, 4]
    assert not list((full.checkpoint_dir / "trials").rglob("*.pt"))  # the question is answered
    assert ask(Seen, full) == resumed and seen[6:] == [1, 2, 3, 4, 1, 2, 3, 4]
    monkeypatch.setattr(trials, "asked", None)
    assert ask(Seen, full) == resumed and len(seen) == 14  # a notebook does not ask


@pytest.mark.parametrize("profile", ["full", "short", "quick"])
def test_own_data_is_not_asked(run, pictures, profile):
    run, own = replace(run, profile=profile), replace(pictures, source="own")
    mine = utils.Batches(own, 20, run)
    assert trials.compare("what?", {}, mine, 4, run).startswith("Not run on your own data.")


def test_one_question_can_be_asked_alone(run, pictures, monkeypatch):
    monkeypatch.setattr(trials, "asked", {"mnist"})
    batches = utils.Batches(pictures, 8, run)
    assert trials.compare("cifar10", {}, batches, 1, run) == "cifar10: not run now."
    monkeypatch.setattr(sys, "argv", ["trials.py", "mnits"])
    with pytest.raises(SystemExit, match="mnits. The questions are mnist, cifar10"):
        trials.main()


@pytest.mark.parametrize("profile, then", [("short", "full"), ("quick", "quick")])
def test_trials_asks_the_full_data(profile, then, monkeypatch):
    monkeypatch.setenv("PROFILE", profile)
    monkeypatch.setattr(sys, "argv", ["trials.py", "mnist"])
    monkeypatch.setattr(trials, "asked", None)
    read = []  # the other notebook's data is not
    monkeypatch.setattr(report, "notebook_definitions", lambda notebook, _: read.append(notebook))
    trials.main()
    assert os.environ["PROFILE"] == then and trials.asked == {"mnist"}
    assert read == ["imageclassification.ipynb"]


@pytest.mark.parametrize("question", trials.CLASSIFICATION)
def test_a_question_alone_reads_no_more_than_it_needs(question, monkeypatch):
    asked, read = [], []
    answer = lambda question, *_: asked.append(question) if question in trials.asked else None  # noqa: E731
    monkeypatch.setattr(trials, "compare", answer)
    cifar10 = utils.load_cifar10
    monkeypatch.setattr(utils, "load_cifar10", lambda run: read.append("CIFAR-10") or cifar10(run))
    monkeypatch.setenv("PROFILE", "quick")
    monkeypatch.setattr(sys, "argv", ["trials.py", question])
    monkeypatch.setattr(trials, "asked", None)
    trials.main()
    assert asked == [question] and bool(read) == (question != "mnist")


def test_the_notebooks_ask_every_question_when_trials_runs_them(monkeypatch):
    asked, read = {}, report.notebook_definitions

    def reads(notebook, tags):
        compare = lambda question, *_: asked.setdefault(notebook, []).append(question)  # noqa: E731
        monkeypatch.setattr(trials, "compare", compare)
        read(notebook, tags)

    monkeypatch.setenv("PROFILE", "quick")
    monkeypatch.setattr(sys, "argv", ["trials.py"])
    monkeypatch.setattr(trials, "asked", None)
    monkeypatch.setattr(report, "notebook_definitions", reads)
    trials.main()
    classification, segmentation = list(trials.CLASSIFICATION), list(trials.SEGMENTATION)
    assert asked["imageclassification.ipynb"] == classification
    assert asked["imagesegmentation.ipynb"] == segmentation
